"""The shared-prefix pass is exact: it equals the padded pass of open_clip itself."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from fastprompt_kernels import prefix_attention
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.class_names import CALTECH, DTD
from fastprompt.backbone import shared_prefix
from fastprompt.backbone.memory import SPARE
from fastprompt.backbone.packing import pack
from fastprompt.errors import InputError
from tests.models import TEXT, VIT, make_backbone, make_clip
from transcriptions.text import encode_padded

ROOT = Path(__file__).parents[2]
WORDS = "a photo of a"
# Text towers as published, with two blocks instead of twelve, and the width of the joint space.
TOWERS = {
    "ViT-B/16": ({"width": 512, "heads": 8}, 512, True),
    "ViT-B/16 with GELU": ({"width": 512, "heads": 8}, 512, False),
    "ViT-L/14": ({"width": 768, "heads": 12}, 768, True),
    "RN50": ({"width": 512, "heads": 8}, 1024, True),
}
# Of 1 to 70 tokens, and one of them twice.
NAMES = (*CALTECH[:3], "star " * 30, CALTECH[0], "sea " * 70)
# Triton's kernels take float16 and bfloat16 only: tests/kernels holds them against the reference by the error rule.
IN_FLOAT64 = ["reference", "sdpa", "blocked"]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name != "ViT-B/16")) for name in TOWERS]
)
def published(request):
    """A backbone with the text tower of a published model and random weights, behind a small image tower."""
    text, embed_dim, quick_gelu = TOWERS[request.param]
    text = {"context_length": 77, "vocab_size": 49408, "layers": 2, **text}
    return make_backbone(make_clip(VIT, text, embed_dim=embed_dim, quick_gelu=quick_gelu))


def gradients(features, context):
    """Features, and the gradient of their product with fixed numbers."""
    weights = torch.randn(features.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return features.detach(), *torch.autograd.grad((features * weights).sum(), context)


def padded_ids(names):
    return open_clip.SimpleTokenizer()(list(names), context_length=77)


def context_of(backbone, groups, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(groups, tokens, backbone.text_width, generator=generator, dtype=torch.float64)
    return (0.5 * context).requires_grad_()


def test_equals_open_clip_on_real_names(published):
    names = CALTECH[:20]
    with torch.no_grad():
        expected = published.model.encode_text(padded_ids(f"{WORDS} {name}" for name in names), normalize=True)
        got = published.encode_prompts(published.embed_words(WORDS)[None], published.tokenize(names))[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.fixture(params=IN_FLOAT64)
def attention(request, monkeypatch):
    """The text tower attends by each implementation in turn."""
    monkeypatch.setattr(shared_prefix, "prefix_attention", partial(prefix_attention, impl=request.param))


def cut(monkeypatch, backbone, shared, lengths):
    """Budgets of memory for all at once, for one context at a time, and for one of the longest names at a time."""
    for tokens in (10**6, shared + sum(lengths), shared + max(lengths)):
        budget = int(tokens * backbone._text.size.per_token(with_gradient=True) / SPARE) + 1
        monkeypatch.setattr(backbone, "memory_budget", budget)
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["shared", "class-specific"])
def padded(published, request):
    """Contexts, and what open_clip's own pass makes of them: features and gradient."""
    context = context_of(published, 2, 4)
    if request.param:
        context = context.detach()[:, None].expand(-1, len(NAMES), -1, -1).clone()
        context = (context + 0.1 * torch.randn_like(context)).requires_grad_()
    return context, gradients(encode_padded(published.model, context, padded_ids(NAMES)), context)


@pytest.mark.usefixtures("attention")
def test_features_and_gradients_equal_the_padded_pass(published, padded, monkeypatch):
    context, expected = padded
    class_tokens = published.tokenize(NAMES)
    own = context.dim() == 4
    lengths = [4 * own + length for length in class_tokens.lengths]
    for _ in cut(monkeypatch, published, 1 if own else 5, lengths):
        got = gradients(published.encode_prompts(context, class_tokens), context)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def contexts_of(learned, kind, classes):
    """One a prompt or one a class as in CoOp, or one an image as in CoCoOp, from a learned tensor (2, M, W)."""
    generator = torch.Generator().manual_seed(5)
    shift = torch.randn(3, classes, 1, learned.shape[-1], generator=generator, dtype=torch.float64)
    return {"prompt": learned, "class": learned[:, None] + shift[:2], "image": learned[0] + shift[:, 0]}[kind]


@pytest.mark.slow
@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("kind", ["prompt", "class", "image"])
@pytest.mark.parametrize(
    "names",
    [("sea",), ("sea", "red star", "sea", "sea"), tuple("sea " * length for length in range(1, 71, 3))],
    ids=["one class", "equal names", "1 to 70 tokens"],
)
def test_contexts_of_prompts_classes_and_images(vit_backbone, names, kind, monkeypatch):
    learned, class_tokens = context_of(vit_backbone, 2, 3), vit_backbone.tokenize(names)
    context = contexts_of(learned, kind, len(names))
    expected = gradients(encode_padded(vit_backbone.model, context, padded_ids(names)), learned)
    own = kind == "class"
    for _ in cut(monkeypatch, vit_backbone, 1 if own else 4, [3 * own + length for length in class_tokens.lengths]):
        context = contexts_of(learned, kind, len(names))
        got = gradients(vit_backbone.encode_prompts(context, class_tokens), learned)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(
    names=st.lists(
        st.lists(st.sampled_from(["red", "striped", "star", "of", "the", "sea"]), min_size=1, max_size=50),
        min_size=1,
        max_size=12,
    ),
    groups=st.integers(1, 3),
    tokens=st.integers(1, 6),
    own=st.booleans(),
)
def test_any_names_contexts_and_lengths(vit_backbone, names, groups, tokens, own):
    names = [" ".join(words) for words in names]
    context = context_of(vit_backbone, groups, tokens)
    if own:
        shift = torch.randn(len(names), 1, vit_backbone.text_width, generator=torch.Generator().manual_seed(5))
        context = (context.detach()[:, None] + shift).requires_grad_()
    padded = context.detach().clone().requires_grad_()
    got = vit_backbone.encode_prompts(context, vit_backbone.tokenize(names))
    expected = encode_padded(vit_backbone.model, padded, padded_ids(names))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    weights = torch.randn_like(expected)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(context.grad, padded.grad, rtol=1e-9, atol=1e-9)


def test_tokens_of_four_prompts_and_the_names_of_dtd(vit_backbone):
    """The example of README and docs/architecture.md: four contexts of four tokens behind the start of text."""
    class_tokens = vit_backbone.tokenize(DTD)
    sequence = pack(class_tokens.lengths, torch.device("cpu")).sequence
    filled = int((sequence >= 0).sum())
    empty = sequence.numel() - filled
    prefix, groups = 1 + 4, 4
    needed, padded = groups * (prefix + filled), groups * len(DTD) * vit_backbone.context_length
    assert (sum(class_tokens.lengths), empty) == (filled, 1)
    for page in ("README.md", "docs/architecture.md"):
        assert f"{needed} tokens instead of {padded:,}" in (ROOT / page).read_text(encoding="utf-8")


def test_suffix_stands_behind_every_name(vit_backbone):
    with_stop = vit_backbone.tokenize(["cat", "polar bear"], suffix=".")
    assert with_stop.ids.tolist() == vit_backbone.tokenize(["cat.", "polar bear."]).ids.tolist()
    assert with_stop.lengths == (3, 4)
    assert with_stop.class_names == ("cat", "polar bear")


def test_a_tower_that_is_not_causal_runs_at_full_length():
    backbone = make_backbone(
        make_clip(VIT, {**TEXT, "context_length": 20, "no_causal_mask": True, "pool_type": "last"})
    )
    assert not backbone.shares_prefix
    names = ["cat", "polar bear"]
    sentences = open_clip.SimpleTokenizer()([f"{WORDS} {name}" for name in names], context_length=20)
    with torch.no_grad():
        expected = backbone.model.encode_text(sentences, normalize=True)
        got = backbone.encode_prompts(backbone.embed_words(WORDS)[None], backbone.tokenize(names))[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_words_behind_the_name_stand_between_it_and_the_suffix(causal):
    other = {} if causal else {"no_causal_mask": True, "pool_type": "last"}
    backbone = make_backbone(make_clip(VIT, {**TEXT, "context_length": 20, **other}))
    names, own = ["cat", "polar bear"], ["one", "two"]
    class_tokens = backbone.tokenize(names, suffix=".")
    before, behind = backbone.embed_words("a photo of")[None], backbone.embed_words("in the wild")[None]
    of_each = torch.stack([backbone.embed_words(word) for word in own])[None]  # (1, C, 1, W)
    cases = (
        (before, behind, "a photo of {} in the wild."),
        (before[:, :0], behind, "{} in the wild."),
        (before, of_each, "a photo of {} {own}."),
        (of_each, behind, "{own} {} in the wild."),
        (of_each[:, :, :0], of_each, "{} {own}."),
    )
    for context, after, sentence in cases:
        sentences = [sentence.format(name, own=word) for name, word in zip(names, own, strict=True)]
        ids = open_clip.SimpleTokenizer()(sentences, context_length=20)
        with torch.no_grad():
            expected = backbone.model.encode_text(ids, normalize=True)
            got = backbone.encode_prompts(context, class_tokens, after)[0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("own", [False, True])
def test_words_behind_the_name_are_encoded_in_pieces(vit_backbone, monkeypatch, own):
    class_tokens = vit_backbone.tokenize(["cat", "polar bear", "sea"], suffix=".")
    context, after = context_of(vit_backbone, 2, 4), context_of(vit_backbone, 2, 3)
    if own:
        after = torch.stack([after, 2 * after, 3 * after], dim=1).detach().requires_grad_()
    expected = gradients(vit_backbone.encode_prompts(context, class_tokens, after), (context, after))
    lengths = [3 + length for length in class_tokens.lengths]
    for _ in cut(monkeypatch, vit_backbone, 5, lengths):
        got = gradients(vit_backbone.encode_prompts(context, class_tokens, after), (context, after))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_a_list_of_names_serves_contexts_of_every_shape(vit_backbone):
    names = ["cat", "polar bear", "sea"]
    kept = vit_backbone.tokenize(names)
    for context, after in [
        ((2, 4), 0),
        ((2, 2), 0),
        ((2, 3, 4), 0),
        ((2, 3, 2), 0),
        ((2, 3, 2), 1),
        ((2, 2), 1),
        ((2, 2), 3),
    ]:
        learned = torch.randn(*context, 48, dtype=torch.float64), torch.randn(2, after, 48, dtype=torch.float64)
        got, expected = (
            vit_backbone.encode_prompts(learned[0], each, learned[1]) for each in (kept, vit_backbone.tokenize(names))
        )
        assert torch.equal(got, expected)


def test_a_context_behind_names_of_unknown_length_is_refused(vit_backbone):
    tokens = replace(vit_backbone.tokenize(["cat"]), name_lengths=())
    with pytest.raises(InputError, match="class_tokens: expected name_lengths"):
        vit_backbone.encode_prompts(torch.zeros(1, 1, 48), tokens, torch.zeros(1, 2, 48))
    with pytest.raises(InputError, match=r"after: expected shape \(G, M, 48\)"):
        vit_backbone.encode_prompts(torch.zeros(1, 1, 48), tokens, torch.zeros(1, 2, 47))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "class_names is empty"),
        (["cat", "  "], "class name '  ' has no words"),
        (["cat", "very " * 80], "is too long: its 81 tokens behind 5 tokens of start and context make 86"),
    ],
)
def test_bad_class_names_are_named(vit_backbone, names, message):
    with pytest.raises(InputError, match=message):
        vit_backbone.encode_prompts(context_of(vit_backbone, 1, 4), vit_backbone.tokenize(names))


def test_wrong_context_shape_is_refused(vit_backbone):
    with pytest.raises(InputError, match=r"expected shape \(G, M, 48\) or \(G, 1, M, 48\), got \(2, 4, 47\)"):
        vit_backbone.encode_prompts(torch.zeros(2, 4, 47), vit_backbone.tokenize(["cat"]))
