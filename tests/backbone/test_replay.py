"""Recorded passes of the text tower. There is no GPU here: the recorder notes every operator and runs it again, on the
same memory, which is what a CUDA graph does with kernels.
"""

import copy
import gc
import sys
import weakref
from functools import partial

import pytest
import torch
from open_clip import SimpleTokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fastprompt.backbone import replay, shared_prefix
from fastprompt.backbone.class_tokens import tokenize_class_names
from fastprompt.backbone.text import TextTower
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


class Recorder:
    """Stands for the recorder of GPUs."""

    def __init__(self, device):
        self.recorded = []

    @staticmethod
    def stream(device):
        return 0

    def warm_up(self, function):
        function()

    def record(self, function):
        with Noted() as noted:
            result = function()
        before = tuple(self.recorded)
        self.recorded.append((noted, result))
        return partial(noted.again, before), result


@pytest.fixture(scope="module")
def plain():
    """Without replays."""
    return make_backbone(make_clip(), cuda_graphs=False)


@pytest.fixture
def backbone(plain, monkeypatch):
    """With replays, and a list of the passes that are not replayed."""
    monkeypatch.setattr(replay, "Recorder", Recorder)
    # It looks at the slots themselves, on a CPU alone.
    monkeypatch.setattr(sys.modules["fastprompt_kernels.prefix_attention"], "_check_queries", lambda *_: None)
    backbone = make_backbone(copy.deepcopy(plain.model))
    backbone.passes, encode = [], TextTower._encode_behind
    passes = backbone.passes

    def spy(tower, *args, **kwargs):
        passes.append(1)
        return encode(tower, *args, **kwargs)

    monkeypatch.setattr(TextTower, "_encode_behind", spy)
    return backbone


def draw(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(backbone, seed, shape=(2, 4, 48), after=None):
    """Features and gradients of a pass."""
    inputs = [draw(size, seed).requires_grad_() for size in (shape, after) if size]
    features = backbone.encode_prompts(inputs[0], TOKENS, *inputs[1:])
    return features.detach(), *torch.autograd.grad((features * draw(features.shape, 99)).sum(), inputs)


def record(backbone, **kwargs):
    for seed in range(replay.REPEATS + 1):
        step(backbone, seed, **kwargs)
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


def test_passes_without_gradients_and_first_ones_are_not_recorded(backbone):
    for seed in range(replay.REPEATS):
        step(backbone, seed)
        with torch.no_grad():
            backbone.encode_prompts(draw((2, 4, 48), seed).requires_grad_(), TOKENS)
    assert len(backbone.passes) == 2 * replay.REPEATS
    assert not backbone._text.replays._recordings


def test_a_pass_over_whose_memory_another_went_is_made_again(plain, backbone):
    expected = [step(plain, seed) for seed in (7, 8)]
    record(backbone)
    contexts = [draw((2, 4, 48), seed).requires_grad_() for seed in (7, 8)]
    features = [backbone.encode_prompts(context, TOKENS) for context in contexts]
    weights = draw(features[0].shape, 99)
    for context, own, (values, gradient) in zip(contexts, features, expected, strict=True):
        assert torch.equal(own, values)
        assert torch.equal(torch.autograd.grad((own * weights).sum(), context)[0], gradient)
    backbone.passes.clear()
    for _ in range(9):
        step(backbone, 7)
    assert len(backbone.passes) == 9  # to make a pass twice in every step would cost more than replays save


def test_gradients_add_up_in_memory_of_their_own(plain, backbone):
    record(backbone)
    context = draw((2, 4, 48), 7).requires_grad_()
    for _ in range(3):
        features = backbone.encode_prompts(context, TOKENS)
        (features * draw(features.shape, 99)).sum().backward()
    torch.testing.assert_close(context.grad, 3 * step(plain, 7)[1], rtol=1e-12, atol=1e-15)


def test_the_backward_pass_can_be_called_twice(backbone):
    record(backbone)
    context = draw((2, 4, 48), 7).requires_grad_()
    loss = (backbone.encode_prompts(context, TOKENS) * draw((2, 3, 32), 99)).sum()
    first, second = (torch.autograd.grad(loss, context, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_third_kind_of_pass_waits_until_a_recording_is_idle(backbone, monkeypatch):
    monkeypatch.setattr(replay, "IDLE", 9)
    for shape in ((1, 4, 48), (2, 4, 48)):
        record(backbone, shape=shape)
    record(backbone, shape=(3, 4, 48))
    for _ in range(5):
        step(backbone, 0, shape=(3, 4, 48))
        step(backbone, 0, shape=(2, 4, 48))
    assert len(backbone.passes) < 5  # it took the place of the first kind, which served nobody
    backbone.passes.clear()
    step(backbone, 0, shape=(1, 4, 48))
    assert len(backbone.passes) == 1


def test_other_names_are_another_kind_of_pass(plain, backbone):
    record(backbone)
    others, context = plain.tokenize(["meadow", "permanent crop land", "sea or pond"]), draw((2, 4, 48), 7)
    got, expected = (each.encode_prompts(context.requires_grad_(), others) for each in (backbone, plain))
    assert torch.equal(got, expected)


def test_weights_that_were_moved_are_recorded_anew(backbone):
    record(backbone)
    for weight in backbone.model.transformer.resblocks[1:].parameters():
        weight.data = weight.data.clone()
    assert torch.isfinite(step(backbone, 7)[1]).all()
    assert len(backbone.passes) == 1


def test_another_attention_is_another_kind_of_pass(backbone, monkeypatch):
    """Else a benchmark of it would time the replays of ours."""
    record(backbone)
    with monkeypatch.context() as other:
        called, usual = [], shared_prefix.prefix_attention
        other.setattr(
            shared_prefix, "prefix_attention", lambda *args, **kwargs: called.append(1) or usual(*args, **kwargs)
        )
        step(backbone, 7)
        assert called and backbone.passes
    backbone.passes.clear()
    step(backbone, 8)
    assert not backbone.passes


def test_what_cannot_be_recorded_is_launched_as_before(backbone, monkeypatch, caplog):
    monkeypatch.setattr(backbone._text.final_norm, "forward", lambda x: x * float(x.abs().max().item() > 0))
    with caplog.at_level("WARNING"):
        record(backbone)
    assert "could not be recorded (aten._local_scalar_dense.default cannot be recorded)" in caplog.text
    step(backbone, 7)
    assert len(backbone.passes) == 1


def test_a_replay_that_is_wrong_is_found_out(plain, backbone, monkeypatch, caplog):
    monkeypatch.setattr(Noted, "again", lambda *_: None)
    record(backbone)
    assert "a replay differs from the pass itself" in caplog.text
    assert all(map(torch.equal, step(backbone, 7), step(plain, 7)))


def test_weights_with_gradients_are_not_replayed(backbone):
    record(backbone)
    scale = backbone._text.final_norm.weight.requires_grad_()
    features = backbone.encode_prompts(draw((2, 4, 48), 7).requires_grad_(), TOKENS)
    assert torch.autograd.grad(features.square().sum() + features.sum(), scale)[0].abs().max() > 0


def test_constants_that_are_not_kept_are_not_recorded(backbone, monkeypatch):
    monkeypatch.setattr(shared_prefix, "CONSTANT_BYTES", 16)
    record(backbone)
    step(backbone, 7)
    assert len(backbone.passes) == 1
    assert not backbone._text.replays._seen


def test_inside_of_checkpoints_passes_are_made_as_before(plain, backbone):
    context = draw((2, 4, 48), 7).requires_grad_()
    for _ in range(replay.REPEATS + 2):
        features = checkpoint(lambda x: backbone.encode_prompts(x, TOKENS), context, use_reentrant=False)
        (gradient,) = torch.autograd.grad((features * draw(features.shape, 99)).sum(), context)
        assert torch.equal(gradient, step(plain, 7)[1])
    assert not backbone._text.replays._recordings


def test_what_a_recording_reads_outlives_the_cache(backbone):
    record(backbone)
    kept = backbone._text.constants._kept
    constants = weakref.ref(*kept.values())
    kept.clear()
    gc.collect()
    assert constants() is not None


def test_recordings_are_gone_with_their_backbone(backbone):
    gc.disable()
    try:
        own = make_backbone(make_clip())
        own.passes = []
        record(own)
        assert own._text.replays._recordings
        alive = weakref.ref(own._text)
        del own
        assert alive() is None
    finally:
        gc.enable()


def test_copies_start_without_recordings(backbone):
    record(backbone)
    twin = copy.deepcopy(backbone)
    assert not twin._text.replays._recordings
    assert all(map(torch.equal, step(twin, 7), step(backbone, 7)))
