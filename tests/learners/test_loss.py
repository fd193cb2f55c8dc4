"""What the losses of learners share: random numbers from a generator, classes shared out to processes."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing

from fastprompt import make_learner
from fastprompt.learners import METHODS
from fastprompt.learners.loss import ClassShard, class_cross_entropy
from tests.learners.support import LABELS, NAMES, moved


@pytest.mark.parametrize("method", METHODS)
def test_all_random_numbers_of_a_loss_come_from_the_generator(vit_backbone, images, method):
    options = {"mixing": 0.5} if method == "dual-view" else {}
    learner, features = moved(make_learner(method, vit_backbone, NAMES, **options)), vit_backbone.encode_images(images)
    if method == "dual-view":
        learner.class_means = features.pooled[[0, 0, 1, 1, 2]]
    scores = learner(features)
    torch.manual_seed(5)
    expected, state = learner.loss(scores, LABELS), torch.get_rng_state()
    generator = torch.Generator()
    for seed, same in ((5, True), (6, method not in ("gallop", "sot-glp", "dual-view"))):
        assert torch.equal(learner.loss(scores, LABELS, generator=generator.manual_seed(seed)), expected) == same
    assert torch.equal(torch.get_rng_state(), state)
    if learner.learns:
        assert torch.equal(learner.backward(scores, LABELS, generator=generator.manual_seed(5)), expected)


def examples():
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(6, 7, dtype=torch.float64, generator=generator)
    return logits, torch.tensor([0, 2, 3, 4, 6, 3])


def on_shard(rank, file, results):
    """One of two processes: classes 0 to 2, or 3 to 6."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    logits, labels = examples()
    shard = (ClassShard(0, 3), ClassShard(3, 7))[rank]
    own = logits[:, shard.start : shard.stop].clone().requires_grad_()
    loss = class_cross_entropy(own, labels, shard=shard)
    (2 * loss).backward()
    torch.save((loss.detach(), own.grad), f"{results}{rank}")
    dist.destroy_process_group()


def test_shards_of_the_classes_have_the_loss_of_all_and_their_own_gradients(tmp_path):
    multiprocessing.spawn(on_shard, (tmp_path / "meeting", tmp_path / "result"), nprocs=2)
    logits, labels = examples()
    logits.requires_grad_()
    loss = F.cross_entropy(logits, labels)
    (2 * loss).backward()
    (first, left), (second, right) = (torch.load(tmp_path / f"result{rank}", weights_only=True) for rank in (0, 1))
    for found in (first, second, class_cross_entropy(logits, labels)):
        torch.testing.assert_close(found.detach(), loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([left, right], dim=1), logits.grad, rtol=1e-12, atol=1e-15)
