"""What the tests of single methods share: a float32 model, 77-token passes, the comparison with a transcription."""

import copy

import torch
from open_clip import SimpleTokenizer

from tests.models import make_backbone, make_clip
from transcriptions.text import encode_padded

NAMES = ("red fox", "polar bear", "cat", "very long name of a dog", "house")
LABELS = torch.tensor([1, 0, 3])


def float32_backbone(backbone=None):
    """The small ViT in float32, or a copy of another backbone."""
    return make_backbone((make_clip() if backbone is None else copy.deepcopy(backbone.model)).float())


def leaves_of(learner):
    """Copies of the learned tensors, for the transcription."""
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in learner.named_parameters()}


def ids(texts):
    return SimpleTokenizer()(list(texts), context_length=77)


def padded_text(backbone, contexts, names=NAMES, suffix=".", **how):
    """Text features (G, C, D) of "<context> <name><suffix>", 77 tokens a class; contexts as for ``encode_padded``."""
    return encode_padded(backbone.model, contexts, ids(f"{name}{suffix}" for name in names), **how)


def template_text(backbone, template, names=NAMES):
    """Text features (C, D) of hand-crafted sentences, as open_clip encodes them."""
    with torch.no_grad():
        return backbone.model.encode_text(ids(template.format(name) for name in names), normalize=True)


def moved(learner, seed=2):
    """The learner away from its start, where some terms vanish and symmetries hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return learner


def assert_equal_to_1e_5(learner, got, expected, leaves):
    """Logits and loss, each (ours, transcription's), and the gradients of all learned tensors and of nothing else."""
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in learner.named_parameters()} == set(leaves)
    for name, parameter in learner.named_parameters():
        assert leaves[name].grad.abs().max() > 1e-4, f"the gradient of {name} says nothing"
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-5, atol=1e-5)
    assert all(parameter.grad is None for parameter in learner.backbone.parameters())


def assert_same_training(learner, base, features):
    """Two learners with the same context have the same loss and gradient, to the last bit."""
    with torch.no_grad():
        base.context.copy_(learner.context)
    losses = [one.backward(one(features), LABELS) for one in (learner, base)]
    assert torch.equal(*losses)
    assert torch.equal(learner.context.grad, base.context.grad)
    assert learner.context.grad.any()
