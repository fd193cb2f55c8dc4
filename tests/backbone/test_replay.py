"""Recorded passes of the text tower. There is no GPU here: what stands for torch's recording notes every operator and
runs it again, on the same memory, which is what a CUDA graph does with kernels.
"""

import copy
import gc
import sys
import weakref

import pytest
import torch
from open_clip import SimpleTokenizer
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastprompt.backbone import prompt_encoder, replay
from fastprompt.backbone.class_tokens import tokenize_class_names
from tests.models import make_backbone, make_clip

aten = torch.ops.aten
TOKENS = tokenize_class_names(["forest", "annual crop land", "sea or lake"], "", SimpleTokenizer().encode, 49407)
# What copies from the host, and what waits for the device.
HOST = aten.lift_fresh.default, aten._local_scalar_dense.default, aten.nonzero.default


class Noted(TorchDispatchMode):
    """Every operator with its arguments and results, and the tensors whose memory they have made."""

    def __init__(self):
        super().__init__()
        self.calls, self.made = [], []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in HOST:
            raise RuntimeError(f"{operator} cannot be recorded")
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, result))
        there = storages((args, kwargs))
        self.made += [x for x in tensors(result) if not storages(x) <= there]
        return result

    def again(self, before=()):
        for operator, args, kwargs, result in self.calls:
            for old, new in zip(tensors(result), tensors(operator(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        for noted, result in before:  # their memory is used by this one
            for x in noted.made:
                if x.is_floating_point() and not storages(x) <= storages(result):
                    x.fill_(torch.nan)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storages(tree):
    return {x.untyped_storage().data_ptr() for x in tensors(tree)}


def make_graphed(function, samples):
    """Stands for torch.cuda.make_graphed_callables, with its memory: inputs, results and gradients have one place."""
    with torch.enable_grad(), Noted() as forward:
        output = function(*samples)
    grad, learned = torch.zeros_like(output), [x for x in samples if x.requires_grad]
    with Noted() as backward:
        grads = torch.autograd.grad(output, learned, grad)
    output = output.detach()

    class Graphed(Function):
        @staticmethod
        def forward(ctx, *inputs):
            for place, x in zip(samples, inputs, strict=True):
                place.copy_(x)
            forward.again()
            return output.detach()

        @staticmethod
        def backward(ctx, given):
            grad.copy_(given)
            backward.again([(forward, output)])
            found = iter(grads)
            return tuple(next(found).detach() if x.requires_grad else None for x in samples)

    return Graphed.apply


@pytest.fixture(scope="module")
def plain():
    """Without replays."""
    return make_backbone(make_clip())


@pytest.fixture
def backbone(plain, monkeypatch):
    """With replays, and a list of the passes that are not replayed."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed)
    monkeypatch.setattr(replay, "_can_record", lambda device: True)
    # It looks at the slots themselves, on a CPU alone.
    monkeypatch.setattr(sys.modules["fastprompt_kernels.prefix_attention"], "_check_queries", lambda *_: None)
    backbone = make_backbone(copy.deepcopy(plain.model), cuda_graphs=True)
    backbone.passes, encode = [], prompt_encoder.encode_shared_prefix
    passes = backbone.passes

    def spy(*args):
        passes.append(1)
        return encode(*args)

    monkeypatch.setattr(prompt_encoder, "encode_shared_prefix", spy)
    return backbone


def draw(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(backbone, seed, shape=(2, 4, 48), after=None):
    """Features and gradients of a pass."""
    inputs = [draw(size, seed).requires_grad_() for size in (shape, after) if size]
    features = backbone.encode_prompts(inputs[0], TOKENS, *inputs[1:])
    return features.detach(), *torch.autograd.grad((features * draw(features.shape, 99)).sum(), inputs)


def record(backbone, **kwargs):
    step(backbone, 0, **kwargs)
    backbone.passes.clear()


@pytest.mark.parametrize(
    ("shape", "after"),
    [((2, 4, 48), None), ((2, 3, 4, 48), None), ((2, 2, 48), (2, 3, 48)), ((1, 3, 1, 48), (1, 3, 2, 48))],
    ids=["shared", "of the classes' own", "behind the names", "both"],
)
def test_replays_give_the_bits_of_the_pass_itself(plain, backbone, shape, after):
    record(backbone, shape=shape, after=after)
    replayed = [step(backbone, seed, shape=shape, after=after) for seed in (7, 8, 9)]
    assert not backbone.passes
    for seed, own in zip((7, 8, 9), replayed, strict=True):
        assert all(map(torch.equal, own, step(plain, seed, shape=shape, after=after)))


def test_nothing_is_recorded_that_is_not_asked_for(plain, backbone):
    step(plain, 0)
    assert not plain._prompts.replays._recordings
    with torch.no_grad():
        backbone.encode_prompts(draw((2, 4, 48), 0).requires_grad_(), TOKENS)
    assert not backbone._prompts.replays._recordings


def test_a_pass_is_made_as_it_is_while_another_waits_for_its_backward_pass(plain, backbone):
    expected = [step(plain, seed) for seed in (7, 8)]
    record(backbone)
    contexts = [draw((2, 4, 48), seed).requires_grad_() for seed in (7, 8)]
    features = [backbone.encode_prompts(context, TOKENS) for context in contexts]
    assert len(backbone.passes) == 1
    weights = draw(features[0].shape, 99)
    for context, own, (values, gradient) in zip(contexts, features, expected, strict=True):
        assert torch.equal(own, values)
        assert torch.equal(torch.autograd.grad((own * weights).sum(), context)[0], gradient)


def test_a_pass_without_a_backward_pass_is_waited_for_no_longer_than_it_lives(backbone):
    record(backbone)
    features = backbone.encode_prompts(draw((2, 4, 48), 7).requires_grad_(), TOKENS)
    step(backbone, 8)
    assert len(backbone.passes) == 1
    del features
    step(backbone, 8)
    assert len(backbone.passes) == 1


def test_gradients_add_up_in_memory_of_their_own(plain, backbone):
    record(backbone)
    context = draw((2, 4, 48), 7).requires_grad_()
    expected = torch.zeros_like(context)
    for seed in (7, 8, 9):
        context.data.copy_(draw((2, 4, 48), seed))
        features = backbone.encode_prompts(context, TOKENS)
        (features * draw(features.shape, 99)).sum().backward()
        expected += step(plain, seed)[1]
    torch.testing.assert_close(context.grad, expected, rtol=1e-12, atol=1e-15)


def test_a_second_backward_pass_is_refused(backbone):
    record(backbone)
    context = draw((2, 4, 48), 7).requires_grad_()
    loss = (backbone.encode_prompts(context, TOKENS) * draw((2, 3, 32), 99)).sum()
    torch.autograd.grad(loss, context, retain_graph=True)
    for _ in range(2):  # at once, and behind the next pass
        with pytest.raises(RuntimeError, match="expected one backward pass of each pass"):
            torch.autograd.grad(loss, context, retain_graph=True)
        step(backbone, 8)


def test_no_more_kinds_of_passes_are_recorded_than_their_memory_may_take(backbone):
    for groups in (1, 2, 3):
        record(backbone, shape=(groups, 4, 48))
    for groups in (1, 2, 3):
        step(backbone, 0, shape=(groups, 4, 48))
    assert len(backbone.passes) == 1


def test_other_names_are_another_kind_of_pass(plain, backbone):
    record(backbone)
    others, context = plain.tokenize(["meadow", "permanent crop land", "sea or pond"]), draw((2, 4, 48), 7)
    got, expected = (each.encode_prompts(context.requires_grad_(), others) for each in (backbone, plain))
    assert torch.equal(got, expected)


def test_constants_that_are_not_kept_are_not_recorded(backbone):
    backbone._prompts.kept.limit = 16
    record(backbone)
    step(backbone, 7)
    assert len(backbone.passes) == 1
    assert not backbone._prompts.replays._recordings


def test_recordings_are_gone_with_their_backbone(backbone):
    gc.disable()
    try:
        own = make_backbone(make_clip(), cuda_graphs=True)
        own.passes = []
        record(own)
        assert own._prompts.replays._recordings
        alive = weakref.ref(own._prompts)
        del own
        assert alive() is None
    finally:
        gc.enable()


def test_copies_start_without_recordings(backbone):
    record(backbone)
    twin = copy.deepcopy(backbone)
    assert not twin._prompts.replays._recordings
    assert all(map(torch.equal, step(twin, 7), step(backbone, 7)))
