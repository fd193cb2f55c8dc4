from pathlib import Path

import pytest
import torch

from fastprompt.errors import InputError
from fastprompt.sources import PATCHES, POOLED, CachedSource, ImageFeatures, ImageSource, ViewSource


class TinyTower(torch.nn.Module):
    """Has a parameter, so that a missing no_grad shows."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def encode_images(self, images):
        patches = self.scale * images.flatten(2).transpose(1, 2)  # (B, S * S, 3)
        return ImageFeatures(patches.mean(1), patches)


def read(paths, *, generator):
    """A picture of the number in the file's name, with noise."""
    number = torch.tensor([float(path.stem) for path in paths])
    noise = torch.rand(len(paths), 3, 2, 2, generator=generator) if generator else torch.zeros(len(paths), 3, 2, 2)
    return number[:, None, None, None] + noise


@pytest.fixture
def images():
    return ImageSource([Path(f"{i}.png") for i in range(6)], [0, 1, 2, 0, 1, 2], read=read, backbone=TinyTower())


def test_image_source_encodes_the_images_asked_for(images):
    features = images.batch(torch.tensor([4, 1, 1]))
    assert features.pooled.tolist() == [[8.0] * 3, [2.0] * 3, [2.0] * 3]
    assert features.patches.shape == (3, 4, 3)
    assert images.labels.dtype == torch.int64 and len(images) == 6


def test_image_source_randomness_is_the_generators(images):
    first, again, other = (
        images.batch(torch.tensor([0, 1]), torch.Generator().manual_seed(seed)).patches for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_features_of_images_can_be_trained_on(images):
    features = images.batch(torch.tensor([0, 3]))
    assert not features.patches.requires_grad
    weight = torch.nn.Parameter(torch.eye(3))
    (features.pooled @ weight).sum().backward()  # fails on tensors made in inference mode
    assert torch.equal(weight.grad, features.pooled.sum(0)[:, None].expand(3, 3))


def test_cached_source_keeps_the_order_asked_for(toy):
    source = toy.source(n=10)
    features = source.batch(torch.tensor([7, 0, 7]))
    assert torch.equal(features.pooled, source.features.pooled[[7, 0, 7]])
    assert len(source) == 10


def test_plain_batches_are_all_images_in_order_without_randomness(images, toy):
    def plain(paths, *, generator):
        assert generator is None
        return 10 * read(paths, generator=None)

    ours = ImageSource(images.paths, images.labels, read=read, read_plain=plain, backbone=TinyTower(), at_once=4)
    batches = list(ours.plain_batches())
    assert [len(features) for features, _ in batches] == [4, 2]
    assert torch.cat([features.pooled[:, 0] for features, _ in batches]).tolist() == [0, 20, 40, 60, 80, 100]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1, 2, 0, 1, 2]
    assert next(images.plain_batches())[0].pooled[2].tolist() == [4.0] * 3

    cached = toy.source(n=300)
    batches = list(cached.plain_batches())
    assert torch.equal(torch.cat([features.pooled for features, _ in batches]), cached.features.pooled)
    assert torch.equal(torch.cat([labels for _, labels in batches]), cached.labels)


def test_view_source_takes_one_view_of_each_image(toy):
    rows = toy.source(n=10).features
    views = [type(rows)(rows.pooled + 10 * number, rows.patches + number) for number in range(3)]
    source = ViewSource(views, torch.arange(10) % 4, lambda: toy.source(n=10))
    indices = torch.tensor([7, 0, 7, 3, 9] * 20)
    first, again, other = (source.batch(indices, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.pooled, again.pooled) and not torch.equal(first.pooled, other.pooled)
    view = ((first.pooled - rows.pooled[indices]) / 10).round()
    torch.testing.assert_close(first.pooled, rows.pooled[indices] + 10 * view)
    assert torch.equal(first.patches, view[:, :1, None].expand(100, 2, 3))  # of the same view
    assert set(view[:, 0].tolist()) == {0, 1, 2}
    assert len(source) == 10 and source.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    ((plain, _),) = source.plain_batches()
    assert torch.equal(plain.pooled, rows.pooled)


def test_what_is_not_read_is_not_loaded(toy, images):
    """Nor kept of images that are encoded: nobody moves it to another device."""
    rows, other = toy.source(n=10).features, toy.source(n=10).features
    made = ImageFeatures(rows.pooled, rows.patches)
    views = ViewSource([rows, other], range(10), lambda: CachedSource(rows, range(10)))
    for source in (CachedSource(made, range(10)), CachedSource(rows, range(10)), views, images):
        for reads in (POOLED, PATCHES):
            features = source.batch(torch.tensor([5, 0, 3]), torch.Generator(), reads)
            assert set(features.tensors) == reads == set(next(source.plain_batches(reads))[0].tensors)
    assert POOLED in rows.named and POOLED in other.named and PATCHES in rows.named
    with pytest.raises(InputError, match=r"expected those of the patches, too, .* alone: .*ask the source for reads="):
        _ = CachedSource(rows, range(10)).batch(torch.tensor([5]), reads=POOLED).patches


def test_view_source_refuses_what_it_cannot_do(toy):
    rows = toy.source(n=10).features
    with pytest.raises(InputError, match="expected at least one view of every image, got none"):
        ViewSource([], [], toy.source)
    with pytest.raises(InputError, match=r"random views need a torch.Generator, got None"):
        ViewSource([rows], torch.zeros(10, dtype=torch.int64), toy.source).batch(torch.tensor([0]))
    with pytest.raises(InputError, match="as many as the 10 cached images, not 3"):
        ViewSource([rows], [0, 1, 2], toy.source)


def test_features_of_every_source_say_which_backbone_made_them(toy, images):
    made = ImageFeatures(torch.ones(10, 3), torch.ones(10, 2, 3), "abc")
    rows, indices = toy.source(n=10).features, torch.tensor([5, 0, 3])
    images.backbone.encode_images = lambda pixels: made[: len(pixels)]
    images.at_once = 2
    for source in (
        CachedSource(made, range(10)),
        CachedSource(rows, range(10), "abc"),
        ViewSource([rows, rows], range(10), toy.source, "abc"),
        images,
    ):
        features = source.batch(indices, torch.Generator())
        assert len(features) == 3 and features.fingerprint == "abc"


def test_labels_must_match(toy):
    with pytest.raises(InputError, match="as many as the 10 cached images, not 3"):
        CachedSource(toy.source(n=10).features, [0, 1, 2])
    with pytest.raises(InputError, match="as many as the 1 image paths, not 2"):
        ImageSource([Path("a.png")], [0, 1], read=read, backbone=TinyTower())


def test_a_source_says_which_features_it_has():
    features = ImageFeatures(torch.rand(3, 8), torch.zeros(3, 2, 3))
    again = ImageFeatures(features.pooled.clone(), features.patches)
    nudged = ImageFeatures(features.pooled.nextafter(torch.ones(())), features.patches)
    labels = [0, 1, 0]
    origin = CachedSource(features, labels).origin
    assert origin.startswith("features in memory with checksum ") and origin == CachedSource(again, labels).origin
    assert CachedSource(nudged, labels).origin != origin
    assert ViewSource([features, nudged], labels, None).origin == f"{origin}; {CachedSource(nudged, labels).origin}"
