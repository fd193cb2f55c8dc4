"""The shared-prefix pass is exact: it equals the padded pass of open_clip itself."""

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.class_names import CALTECH
from benchmarks.peers import encode_padded
from fastprompt.errors import InputError
from tests.models import TEXT, VIT, make_backbone, make_clip

WORDS = "a photo of a"
TEXT_B16 = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}


@pytest.fixture(scope="module")
def text_b16():
    """The text tower of ViT-B/16 with random weights, behind a small image tower."""
    return make_backbone(make_clip(VIT, TEXT_B16, embed_dim=512))


def padded_ids(names):
    return open_clip.SimpleTokenizer()(list(names), context_length=77)


def context_of(backbone, groups, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(groups, tokens, backbone.text_width, generator=generator, dtype=torch.float64)
    return (0.5 * context).requires_grad_()


def test_equals_open_clip_on_100_real_names_in_float64(text_b16):
    sentences = padded_ids(f"{WORDS} {name}" for name in CALTECH)
    with torch.no_grad():
        expected = text_b16.model.encode_text(sentences, normalize=True)
        got = text_b16.encode_prompts(text_b16.embed_words(WORDS)[None], text_b16.tokenize(CALTECH))[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_equals_open_clip_on_100_real_names_in_float32():
    backbone = make_backbone(make_clip(VIT, TEXT_B16, embed_dim=512).float())
    sentences = padded_ids(f"{WORDS} {name}" for name in CALTECH)
    with torch.no_grad():
        expected = backbone.model.encode_text(sentences, normalize=True)
        got = backbone.encode_prompts(backbone.embed_words(WORDS)[None], backbone.tokenize(CALTECH))[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_context_gradient_equals_that_of_the_padded_pass(text_b16):
    names = CALTECH[:5]
    weights = torch.randn(2, 5, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ours, padded = context_of(text_b16, 2, 4), context_of(text_b16, 2, 4)
    (text_b16.encode_prompts(ours, text_b16.tokenize(names)) * weights).sum().backward()
    (encode_padded(text_b16.model, padded, padded_ids(names)) * weights).sum().backward()
    assert padded.grad.abs().max() > 1e-3
    torch.testing.assert_close(ours.grad, padded.grad, rtol=1e-10, atol=1e-10)


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
