"""Plain transcriptions of what PLOT and SOT-GLP compute: dense tensors, the transport loop as published."""

import copy

import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer

from benchmarks.peers import encode_padded
from tests.models import make_backbone

NAMES = ("red fox", "polar bear", "cat", "very long name of a dog", "cat")
LABELS = torch.tensor([1, 0, 3])


def ids(names):
    return SimpleTokenizer()(list(names), context_length=77)


def float32_backbone(vit_backbone):
    return make_backbone(copy.deepcopy(vit_backbone.model).float())


def moved(learner, seed=2):
    """The learner away from its start, so that no symmetry hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return learner


def leaves_of(learner):
    return {name: value.detach().clone().requires_grad_() for name, value in learner.named_parameters()}


def encode(learner, context, suffix, **how):
    names = ids(f"{name}{suffix}" for name in learner.class_names)
    return encode_padded(learner.backbone.model, context, names, **how)


def published_plan(cosines):
    """Plans (X, M, N) of cosines (X, M, N)."""
    with torch.no_grad():
        kernel = torch.exp(-(1 - cosines) / 0.1)
        M, N = kernel.shape[1:]
        rows, columns = torch.ones(len(kernel), M).to(kernel), torch.ones(len(kernel), N).to(kernel)
        for _ in range(100):
            before = rows
            rows = (1 / M) / torch.einsum("xmn,xn->xm", kernel, columns)
            columns = (1 / N) / torch.einsum("xmn,xm->xn", kernel, rows)
            if (rows - before).abs().mean().item() < 1e-2:
                break
        return torch.einsum("xm,xmn,xn->xmn", rows, kernel, columns)


def transported(local, text, keep=None):
    """The plans, and the scores (B, C), of patches (B, P, D) and prompts (N, C, D)."""
    cosines = torch.einsum("bpd,ncd->bpcn", local, text)
    if keep is not None:
        best = cosines.mean(-1).topk(keep, dim=1).indices  # (B, keep, C)
        cosines = cosines.gather(1, best[..., None].expand(-1, -1, -1, len(text)))
    cosines = cosines.permute(0, 2, 1, 3)  # (B, C, P, N)
    plan = published_plan(cosines.flatten(0, 1)).view(cosines.shape)
    return plan, (plan * cosines).sum((2, 3))


def assert_equal_to_1e_5(scores, loss, learner, logits, expected, leaves):
    """Logits, loss and gradients of a learner in float32 beside those of its transcription."""
    loss.backward()
    expected.backward()
    torch.testing.assert_close(scores.logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in learner.named_parameters()} == set(leaves)
    for name, parameter in learner.named_parameters():
        assert leaves[name].grad.abs().max() > 1e-4
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-5, atol=1e-5)
    assert all(parameter.grad is None for parameter in learner.backbone.parameters())


def local_features(learner, features):
    return F.normalize(features.patches @ learner.backbone.model.visual.proj, dim=-1)
