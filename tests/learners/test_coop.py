"""CoOp in all its forms against a transcription of its equations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer

from fastprompt import CoOp, InputError
from tests.models import make_backbone, make_clip
from transcriptions.text import encode_embedded

NAMES = ("red fox", "cat", "very long name of a dog", "St. Bernard")
LABELS = torch.tensor([1, 0, 3])


def padded_text(model, context, position):
    """Text features (C, D) as CoOp makes them: "X X X X name." is tokenised, and the context replaces the X.

    Args:
        model: of open_clip.
        context: (C, M, W).
        position: end, middle or front.
    """
    tokenizer, tokens = SimpleTokenizer(), context.shape[1]
    half = tokens // 2
    sequences, ends = [], []
    for name, own in zip(NAMES, context, strict=True):
        ids = tokenizer([f"{'X ' * tokens}{name}."], context_length=77)[0]
        embedded, length = model.token_embedding(ids), len(tokenizer.encode(name))
        start, rest = embedded[:1], embedded[1 + tokens :]
        ordered = {
            "end": [start, own, rest],
            "middle": [start, own[:half], rest[:length], own[half:], rest[length:]],
            "front": [start, rest[:length], own, rest[length:]],
        }
        sequences.append(torch.cat(ordered[position]))
        ends.append(ids.argmax())
    return encode_embedded(model, torch.stack(sequences), torch.stack(ends))


@pytest.mark.parametrize("class_specific", [False, True], ids=["shared", "class-specific"])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_equals_its_equations_in_float32(position, class_specific, images):
    backbone = make_backbone(make_clip().float())
    features = backbone.encode_images(images)
    torch.manual_seed(0)
    learner = CoOp(backbone, NAMES, context=5, position=position, class_specific=class_specific)
    scores = learner(features)
    loss = learner.loss(scores, LABELS)
    loss.backward()

    # In float64: the padded pass itself errs by more than 1e-5 in float32, with some numbers of threads.
    context = learner.context.detach().double().requires_grad_()
    every = context if class_specific else context.expand(len(NAMES), -1, -1)
    text = padded_text(copy.deepcopy(backbone.model).double(), every, position)
    logits = backbone.logit_scale * features.pooled.double() @ text.T
    expected = F.cross_entropy(logits, LABELS)
    expected.backward()
    assert context.grad.abs().max() > 1e-4
    for ours, exact in ((scores.logits, logits), (loss, expected), (learner.context.grad, context.grad)):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_words_start_every_class_alike_and_random_contexts_differ(vit_backbone):
    words = CoOp(vit_backbone, NAMES, class_specific=True).context
    assert words.shape == (4, 4, 48)
    assert all(torch.equal(own, vit_backbone.embed_words("a photo of a")) for own in words)
    torch.manual_seed(0)
    random = CoOp(vit_backbone, NAMES, context=16, class_specific=True).context
    assert random.shape == (4, 16, 48)
    assert random.std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(random[0], random[1])


def test_class_specific_contexts_know_no_other_classes(vit_backbone):
    learner = CoOp(vit_backbone, NAMES, class_specific=True)
    assert learner.with_class_names(NAMES).class_names == NAMES
    message = (
        "class_names: coop learned a context for each of its 4 classes, so expected red fox, .*, got dog, cat, ..."
    )
    with pytest.raises(InputError, match=message):
        learner.with_class_names(["dog", "cat"])


def test_an_unknown_position_is_refused(vit_backbone):
    with pytest.raises(InputError, match="position: expected one of end, middle, front, got 'back'"):
        CoOp(vit_backbone, NAMES, position="back")
