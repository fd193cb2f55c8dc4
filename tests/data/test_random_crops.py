import numpy as np
import pytest
import torch
from fastprompt_kernels import resized_crop
from PIL import Image
from torchvision.transforms import v2

from fastprompt.data import draw_crops, seeded_crops

PICTURES = [(61, 97), (130, 40), (20, 200), (200, 20), (2, 3)]  # height, width


@pytest.mark.parametrize(("height", "width"), PICTURES)
def test_crops_are_torchvisions_for_the_same_stream(height, width):
    """torchvision draws from the global generator; in the same order, so equal seeds give equal crops and flips."""
    ramp = torch.arange(float(height * width)).view(1, height, width)  # its first value tells the place
    for seed in range(20):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            box = v2.RandomResizedCrop(32, scale=(0.08, 1.0)).make_params([ramp])
            flipped = bool(v2.RandomHorizontalFlip()(ramp)[0, 0, 0] != 0)
        crops = seeded_crops(torch.tensor([[9, 9], [height, width]]), [99, seed])
        assert crops.boxes[1].tolist() == [box[name] for name in ("top", "left", "height", "width")]
        assert crops.flips[1] == flipped


def test_crops_of_a_batch_depend_on_its_generator_alone():
    sizes = torch.tensor(PICTURES)

    def draw(seed, sizes=sizes):
        return draw_crops(sizes, torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    first, again, other = draw(7), draw(7), draw(8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.boxes, again.boxes) and torch.equal(first.flips, again.flips)
    assert not torch.equal(first.boxes, other.boxes)
    replaced = sizes.clone()
    replaced[0] = torch.tensor([2, 500])  # takes another number of attempts
    assert torch.equal(draw(7, replaced).boxes[1:], first.boxes[1:])
    same = draw(7, torch.tensor([[400, 500]] * 30))
    assert len(set(map(tuple, same.boxes.tolist()))) == 30
    assert 5 < same.flips.sum() < 25


@pytest.mark.parametrize("impl", ["blocked", "reference"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crops_are_resized_as_published(impl, interpolation):
    """By Pillow, columns first, as 8-bit levels in between: whole resizes of Pillow 13 take the rows of some first."""
    mode, generator = Image.Resampling[interpolation.upper()], np.random.default_rng(0)
    differences = []
    for seed in range(20):
        height, width = (int(side) for side in generator.integers(20, 250, 2))
        levels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        crops = seeded_crops(torch.tensor([[height, width]]), [seed])
        top, left, h, w = crops.boxes[0].tolist()
        narrow = Image.fromarray(levels[top : top + h, left : left + w]).resize((64, h), mode)
        expected = torch.from_numpy(np.array(narrow.resize((64, 64), mode))).permute(2, 0, 1)
        place = torch.tensor([[0, height, width]])
        pixels = torch.from_numpy(levels).flatten()
        actual = 255 * resized_crop(pixels, place, crops.boxes, 64, interpolation=interpolation, impl=impl)[0]
        differences.append((actual - expected).abs().flatten())
    difference = torch.cat(differences)
    assert difference.max() < 2.5
    assert (difference > 0.5).float().mean() <= 0.01  # as docs/kernels.md says
