"""Each layer against a transcription of what it takes the place of: outputs and gradients; and what it refuses."""

import copy

import pytest
import torch
from open_clip import SimpleTokenizer
from torch import nn

from fastprompt import InputError
from fastprompt.layers import GlobalLocalLoss, SharedPrefixTextEncoder, TopKLocalHead
from fastprompt.learners import local as local_scores
from tests.models import make_clip
from transcriptions.drop_in import (
    OpenAIClip,
    coop_prompts,
    dense_local_logits,
    gallop_text,
    global_local_loss,
    text_encoder,
    topk_reduce,
)

NAMES = ("cat", "red fox", "very long name of a dog", "polar bear", "a photo")
TOKENIZER = SimpleTokenizer()


def placeholders(own):
    """Token ids and name lengths as in CoOp's PromptLearner, with "X" where a context of so many tokens stands."""
    texts = [f"{' '.join(['X'] * own)} {name}." for name in NAMES]
    return TOKENIZER(texts, context_length=77), [len(TOKENIZER.encode(name)) for name in NAMES]


@pytest.fixture(scope="module", params=["openai", "open_clip"])
def model(request):
    torch.manual_seed(0)
    made = OpenAIClip() if request.param == "openai" else make_clip().float()
    return made.eval().requires_grad_(False)


def assert_same_results_and_gradients(ours, theirs, leaf):
    """Assert that two functions of a learned tensor have the same results and gradients."""
    results = []
    for function in (ours, theirs):
        learned = leaf.clone().requires_grad_()
        features = function(learned)
        weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
        (features * weights).sum().backward()
        assert learned.grad.abs().max() > 1e-3
        results.append((features.detach(), learned.grad))
    for ours_one, theirs_one in zip(*results, strict=True):
        torch.testing.assert_close(ours_one, theirs_one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_text_encoder_equals_that_of_coop(model, position):
    ids, lengths = placeholders(4)
    encoder, context = SharedPrefixTextEncoder(model), 0.3 * torch.randn(4, 48)
    assert_same_results_and_gradients(
        lambda learned: encoder(coop_prompts(model, learned, ids, lengths, position), ids),
        lambda learned: text_encoder(model, coop_prompts(model, learned, ids, lengths, position), ids),
        context,
    )


@pytest.mark.parametrize("start", ["random", "equal"])
def test_class_specific_contexts_keep_gradients_of_their_own_even_if_they_start_equal(model, start):
    ids, lengths = placeholders(3)
    context = 0.3 * torch.randn(len(NAMES) if start == "random" else 1, 3, 48).expand(len(NAMES), -1, -1)
    encoder = SharedPrefixTextEncoder(model)
    assert_same_results_and_gradients(
        lambda learned: encoder(coop_prompts(model, learned, ids, lengths), ids),
        lambda learned: text_encoder(model, coop_prompts(model, learned, ids, lengths), ids),
        context,
    )


def test_contexts_that_a_network_makes_of_each_name_keep_their_gradients(model):
    ids, lengths = placeholders(2)
    of_names = torch.randn(len(NAMES), 6)
    encoder, network = SharedPrefixTextEncoder(model), torch.zeros(6, 2 * 48)  # all contexts start equal
    base = 0.3 * torch.randn(2, 48)

    def prompts(learned):
        return coop_prompts(model, base + (of_names @ learned).unflatten(1, (2, 48)), ids, lengths)

    assert_same_results_and_gradients(
        lambda learned: encoder(prompts(learned), ids),
        lambda learned: text_encoder(model, prompts(learned), ids),
        network,
    )


def test_text_encoder_takes_the_loop_over_images_of_cocoop(model):
    ids, lengths = placeholders(4)
    encoder, shifts = SharedPrefixTextEncoder(model), 0.3 * torch.randn(2, 1, 48)

    def per_image(learned):
        contexts = learned + shifts  # (B, M, W)
        return torch.stack([coop_prompts(model, context, ids, lengths) for context in contexts])

    assert_same_results_and_gradients(
        lambda learned: torch.stack([encoder(rows, ids) for rows in per_image(learned)]),
        lambda learned: torch.stack([text_encoder(model, rows, ids) for rows in per_image(learned)]),
        0.3 * torch.randn(4, 48),
    )


def test_encode_equals_that_of_gallop(model):
    ids = TOKENIZER(list(NAMES), context_length=77)
    encoder = SharedPrefixTextEncoder(model)
    assert_same_results_and_gradients(
        lambda learned: encoder.encode(learned, ids),
        lambda learned: gallop_text(model, learned, ids),
        0.3 * torch.randn(3, 4, 48),
    )


def under_autocast(function, context, dtype, backward_inside):
    """Features and gradient of a function of a context."""
    learned = context.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        features = function(learned)
        loss = features.float().square().sum()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return features.detach(), learned.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_text_encoder_computes_in_the_precision_of_its_weights(model, dtype):
    """GalLoP's script calls backward behind autocast; inside, torch itself rounds, in the replaced code as well."""
    ids, lengths = placeholders(4)
    names, encoder = TOKENIZER(list(NAMES), context_length=77), SharedPrefixTextEncoder(model)
    context = 0.3 * torch.randn(1, 4, 48)
    for ours, theirs in (
        (lambda learned: encoder.encode(learned, names), lambda learned: gallop_text(model, learned, names)),
        (
            lambda learned: encoder(coop_prompts(model, learned[0], ids, lengths), ids),
            lambda learned: text_encoder(model, coop_prompts(model, learned[0], ids, lengths), ids),
        ),
    ):
        expected, gradient = under_autocast(ours, context, None, False)
        features, behind = under_autocast(ours, context, dtype, False)
        assert features.dtype == torch.float32
        assert torch.equal(features, expected)
        assert torch.equal(behind, gradient)
        inside, replaced = (under_autocast(one, context, dtype, True)[1] for one in (ours, theirs))
        assert (inside - gradient).norm() <= (replaced - gradient).norm()


def test_a_shared_context_is_encoded_once(model, monkeypatch):
    """Tokens that go through the tower: the prefix once, behind it the real tokens of the names."""
    from fastprompt.layers import text_encoder as module

    seen = []
    run = module.end_of_text_states
    monkeypatch.setattr(
        module,
        "end_of_text_states",
        lambda blocks, prefix, *rest: seen.append(prefix.shape) or run(blocks, prefix, *rest),
    )
    ids, lengths = placeholders(4)
    encoder = SharedPrefixTextEncoder(model)
    shared = torch.randn(4, 48).requires_grad_()
    encoder(coop_prompts(model, shared, ids, lengths), ids)
    encoder(coop_prompts(model, torch.randn(len(NAMES), 4, 48), ids, lengths), ids)
    assert seen == [(1, 5, 48), (1, 1, 48)]


def test_modules_are_those_of_the_model(model):
    encoder = SharedPrefixTextEncoder(model)
    assert encoder.transformer is model.transformer
    assert {name.split(".")[0] for name, _ in encoder.named_parameters()} == {
        "transformer",
        "token_embedding",
        "positional_embedding",
        "ln_final",
        "text_projection",
    }


class DeepPromptBlock(nn.Module):
    pass


def test_text_encoder_refuses_what_it_cannot_speed_up(model):
    deep = copy.deepcopy(model)
    deep.transformer.resblocks[1] = DeepPromptBlock()
    with pytest.raises(InputError, match="expected the plain ResidualAttentionBlock of a CLIP, got DeepPromptBlock"):
        SharedPrefixTextEncoder(deep)
    open_eyed = copy.deepcopy(model)
    if isinstance(model, OpenAIClip):
        open_eyed.transformer.resblocks[0].attn_mask = torch.zeros(77, 77)
    else:
        open_eyed.attn_mask = None
    with pytest.raises(InputError, match="expected a causal text tower"):
        SharedPrefixTextEncoder(open_eyed)
    with pytest.raises(InputError, match="text transformer of a CLIP, got Linear"):
        SharedPrefixTextEncoder(nn.Linear(2, 2))

    other = copy.deepcopy(model)
    other.transformer.resblocks[1].mlp.gelu = nn.ReLU()
    with pytest.raises(InputError, match="expected QuickGELU or GELU in a block, got ReLU"):
        SharedPrefixTextEncoder(other)
    learning = SharedPrefixTextEncoder(copy.deepcopy(model).requires_grad_())
    with pytest.raises(InputError, match="frozen text transformer, got weights that require gradients"):
        learning.encode(torch.randn(2, 4, 48), placeholders(2)[0])

    encoder, (ids, lengths) = SharedPrefixTextEncoder(model), placeholders(2)
    prompts = coop_prompts(model, torch.randn(2, 48), ids, lengths)
    with pytest.raises(InputError, match=r"expected prompts \(C, 77, 48\).*got \(5, 76, 48\)"):
        encoder(prompts[:, :76], ids)
    with pytest.raises(InputError, match="got a learned tensor itself"):
        encoder(prompts.clone().requires_grad_(), ids)
    with pytest.raises(InputError, match="rows differ at position 0"):
        encoder(prompts + torch.arange(5)[:, None, None], ids)
    with pytest.raises(InputError, match=r"expected context \(G, M, 48\)"):
        encoder.encode(torch.randn(2, 4, 47), ids)
    with pytest.raises(InputError, match="name 2 has 10 tokens, which do not fit behind a context of 68 into the 77"):
        encoder.encode(torch.randn(2, 68, 48), ids)


@pytest.fixture
def local():
    """GalLoP's inputs of the local half: features (B, P, W), its projections, text (C, n, D), and scores' parts."""
    torch.manual_seed(4)
    projection = nn.Linear(24, 24, bias=False)
    text = torch.randn(6, 3, 16)
    return torch.randn(2, 9, 24), projection, torch.randn(24, 16), text / text.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("topk", [(1, 3, 20), (4,)])
@pytest.mark.parametrize("held", [1, 2**20], ids=["image by image", "all images"])
def test_local_head_and_loss_equal_those_of_gallop(local, topk, held, monkeypatch):
    seen, unit = [], local_scores.unit_patches
    monkeypatch.setattr(local_scores, "BYTES_ON_CPU", held)
    monkeypatch.setattr(local_scores, "unit_patches", lambda some, *rest: seen.append(len(some)) or unit(some, *rest))
    features, projection, visual_proj, text = local
    global_logits, targets = 0.3 * torch.randn(2, 6, 4), torch.tensor([5, 2])
    head, loss = TopKLocalHead(topk), GlobalLocalLoss(topk=topk, global_dropout_p=0.5)

    def leaves():
        return [
            tensor.detach().clone().requires_grad_() for tensor in (features, projection.weight, text, global_logits)
        ]

    mine, theirs = leaves(), leaves()
    pooled = head(mine[0], mine[2], mine[1].T @ visual_proj)
    dense = dense_local_logits(theirs[0], lambda x: x @ theirs[1].T, visual_proj, theirs[2])
    torch.testing.assert_close(pooled, topk_reduce(dense, topk), rtol=1e-5, atol=1e-5)
    torch.manual_seed(5)
    ours = loss(mine[3], pooled, targets, 100.0)
    torch.manual_seed(5)
    expected = global_local_loss(theirs[3], dense, targets, 100.0, topk, 0.5)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    ours.backward()
    expected.backward()
    assert seen == ([1, 1, 1, 1] if held == 1 else [2, 2]), "images at a time, forward and backward"
    for one, other in zip(mine, theirs, strict=True):
        assert one.grad.abs().max() > 1e-3
        # Elements are sums of terms as large as the largest of them.
        largest = other.grad.abs().max().item()
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-5 * max(1, largest))


def test_local_head_takes_projected_features(local):
    features, projection, visual_proj, text = local
    head = TopKLocalHead((2, 3, 4))
    composed = projection.weight.T @ visual_proj
    torch.testing.assert_close(head(features @ composed, text), head(features, text, composed))


def test_half_losses(local):
    global_logits, pooled, targets = torch.randn(2, 6, 1), torch.randn(2, 6, 3), torch.tensor([5, 2])
    both_parts = GlobalLocalLoss(topk=(1, 2, 3))(global_logits, pooled, targets, 10.0)
    of_global = GlobalLocalLoss(use_local_loss=False)(global_logits, pooled, targets, 10.0)
    of_local = GlobalLocalLoss(use_global_loss=False, topk=(1, 2, 3))(global_logits, pooled, targets, 10.0)
    torch.testing.assert_close(both_parts, of_global + of_local)
    torch.testing.assert_close(of_global, GlobalLocalLoss()(global_logits, None, targets, 10.0))


def test_local_layers_refuse_what_does_not_fit(local):
    features, _, visual_proj, text = local
    with pytest.raises(InputError, match=r"topk: expected 1 or 3 numbers for 3 local prompts, got \(1, 2\)"):
        TopKLocalHead((1, 2))(features, text, visual_proj)
    with pytest.raises(InputError, match="topk: expected one number of patches of at least 1"):
        TopKLocalHead((0,))
    with pytest.raises(InputError, match="give the projection, if they are not projected yet"):
        TopKLocalHead((1,))(features, text)
    with pytest.raises(InputError, match=r"projection: expected shape \(24, 16\), got \(16, 24\)"):
        TopKLocalHead((1,))(features, text, visual_proj.T)
    with pytest.raises(InputError, match=r"local_features \(B, P, W\)"):
        TopKLocalHead((1,))(features[0], text)
    with pytest.raises(InputError, match=r"expected the pooled \(B, C, n\) of TopKLocalHead, got shape \(2, 9, 6, 3\)"):
        GlobalLocalLoss()(torch.randn(2, 6, 1), torch.randn(2, 9, 6, 3), torch.tensor([1, 2]), 10.0)
    with pytest.raises(InputError, match="topk: expected 1 or 3 numbers"):
        GlobalLocalLoss(topk=(1, 2))(torch.randn(2, 6, 1), torch.randn(2, 6, 3), torch.tensor([1, 2]), 10.0)
