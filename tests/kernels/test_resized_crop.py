"""resized_crop against torchvision, crop by crop."""

from dataclasses import dataclass

import pytest
import torch
from fastprompt_kernels import resized_crop
from fastprompt_kernels.resized_crop import blocked
from fastprompt_kernels.testing import poisoned_memory
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
each_implementation = pytest.mark.parametrize("impl", ["reference", "blocked", "triton"])
each_interpolation = pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])

# Image height and width, then top, left, height and width of the box. Larger and smaller than the result, as large, one
# pixel, a row, a column; inside of the image, and at its border.
CROPS = (
    (60, 90, (3, 5, 50, 41)),
    (130, 70, (7, 0, 123, 61)),
    (40, 40, (0, 0, 40, 40)),
    (50, 50, (30, 12, 11, 23)),
    (20, 30, (19, 29, 1, 1)),
    (33, 200, (8, 0, 1, 200)),
    (200, 33, (0, 32, 200, 1)),
)


@dataclass(frozen=True)
class Crops:
    """Arguments of resized_crop, with something before, between and after the images."""

    pixels: torch.Tensor
    places: torch.Tensor
    boxes: torch.Tensor
    flips: torch.Tensor

    def __call__(self, size, **options):
        return resized_crop(self.pixels.to(DEVICE), self.places, self.boxes, size, flips=self.flips, **options).cpu()

    def images(self):
        """Each image as (3, height, width), with its box and whether it is flipped."""
        for (start, height, width), box, flip in zip(
            self.places.tolist(), self.boxes.tolist(), self.flips.tolist(), strict=True
        ):
            image = self.pixels[start : start + 3 * height * width].view(height, width, 3)
            yield image.permute(2, 0, 1).contiguous(), box, flip


def make(dtype=torch.uint8):
    """Noise: it makes the cubic filter overshoot the levels that there are."""
    generator = torch.Generator().manual_seed(0)
    gap, pieces, places, end = torch.full((5,), 77.0), [], [], 0
    for height, width, _ in CROPS:
        image = torch.rand(height * width * 3, generator=generator)
        places.append((end + len(gap), height, width))
        pieces += [gap, (image * 255).round() if dtype == torch.uint8 else image]
        end += len(gap) + len(image)
    boxes = torch.tensor([box for _, _, box in CROPS])
    flips = torch.arange(len(CROPS)) % 3 == 1
    return Crops(torch.cat([*pieces, gap]).to(dtype), torch.tensor(places), boxes, flips)


def by_torchvision(crops, size, interpolation):
    """(B, 3, S, S)."""
    mode, results = InterpolationMode(interpolation), []
    for image, box, flip in crops.images():
        result = tv.resized_crop(image, *box, [size, size], mode, antialias=True)
        results.append(result.flip(-1) if flip else result)
    return torch.stack(results)


@each_implementation
@each_interpolation
def test_floating_point_pixels_equal_torchvision(impl, interpolation):
    crops = make(torch.float32)
    expected = tv.normalize(by_torchvision(crops, 40, interpolation), MEAN, STD)
    with poisoned_memory():
        actual = crops(40, mean=MEAN, std=STD, interpolation=interpolation, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


# Torch resamples levels with weights of 16 bits where there are vector instructions for it, and in floating point
# elsewhere: then it does not round between the passes. Other weights move few values across a rounding, between the
# passes and at the end.
@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="torchvision rounds otherwise"
)
@each_implementation
@each_interpolation
def test_levels_are_torchvisions_but_for_rounding(impl, interpolation):
    crops = make()
    levels = 255 * crops(33, interpolation=interpolation, impl=impl)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    difference = (levels.round() - by_torchvision(crops, 33, interpolation)).abs()
    if impl == "blocked" and DEVICE == "cpu":
        assert difference.max() == 0
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 0.01


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_levels_are_rounded_after_each_axis_where_torch_does_not_resample_them(monkeypatch, interpolation):
    crops = make()
    monkeypatch.setattr(blocked, "RESAMPLES_LEVELS", ())
    actual = crops(33, interpolation=interpolation, impl="blocked")
    assert torch.equal(actual, crops(33, interpolation=interpolation, impl="reference"))


@each_implementation
def test_levels_are_normalised_as_torchvision_does(impl):
    crops = make()
    levels = 255 * crops(24, impl=impl)
    expected = tv.normalize(levels.round().div(255), MEAN, STD)
    torch.testing.assert_close(crops(24, mean=MEAN, std=STD, impl=impl), expected, rtol=0, atol=1e-6)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounded_float32(impl, dtype):
    crops = make()
    full = crops(24, mean=MEAN, std=STD, impl=impl)
    half = crops(24, mean=MEAN, std=STD, impl=impl, dtype=dtype)
    if impl == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts bits off
        full = full.view(torch.int32).bitwise_and(-(2**16)).view(torch.float32)
    assert torch.equal(half, full.to(dtype))


@each_implementation
def test_an_image_does_not_depend_on_its_batch(impl):
    crops = make()
    whole = crops(24, impl=impl)
    parts = [
        Crops(crops.pixels, crops.places[part], crops.boxes[part], crops.flips[part])(24, impl=impl)
        for part in (slice(0, 3), slice(3, 3), slice(3, None))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_float64_pixels_are_resized_in_float64():
    crops = make(torch.float64)
    reference = crops(24, dtype=torch.float64, impl="reference")
    torch.testing.assert_close(crops(24, dtype=torch.float64), reference, rtol=0, atol=1e-14)
    assert (reference - make(torch.float32)(24, impl="reference").double()).abs().max() > 1e-9
    with pytest.raises(ValueError, match="impl='triton' cannot run here: the kernel takes no float64 pixels"):
        crops(24, impl="triton")


@pytest.mark.parametrize("impl", ["blocked", "triton"])
def test_opcheck(impl):
    crops = make()
    table = torch.cat([crops.places, crops.boxes, crops.flips[:, None]], dim=1)[:2]
    arguments = (crops.pixels.to(DEVICE), table, 8, list(MEAN), list(STD), "bicubic", torch.bfloat16, impl)
    torch.library.opcheck(torch.ops.fastprompt.resized_crop.default, arguments)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"pixels": torch.zeros(60, dtype=torch.int32)}, TypeError, "pixels must be uint8 or floating-point, got"),
        ({"pixels": torch.zeros(5, 12)}, ValueError, r"pixels must have shape \(N,\), got \(5, 12\)"),
        ({"places": torch.tensor([[1, 4, 5]])}, ValueError, r"places\[0\] = \[1, 4, 5\] .* is no image within the 60"),
        ({"places": torch.tensor([[0.0, 4, 5]])}, TypeError, "places must be torch.int64, got torch.float32"),
        ({"boxes": torch.tensor([[1, 0, 4, 5]])}, ValueError, r"boxes\[0\] = \[1, 0, 4, 5\] .* height 4 and width 5"),
        ({"boxes": torch.tensor([[0, 0, 4]])}, ValueError, r"boxes must have shape \(1, 4\) on the CPU, got \(1, 3\)"),
        ({"flips": torch.tensor([1])}, TypeError, "flips must be torch.bool, got torch.int64"),
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"std": (1, 0, 1)}, ValueError, "mean and std must be three numbers each, std above 0"),
        ({"interpolation": "nearest"}, ValueError, "interpolation must be one of"),
        ({"dtype": torch.uint8}, TypeError, "dtype must be a floating-point dtype, got torch.uint8"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
    ],
)
def test_bad_arguments(changes, error, sentence):
    arguments = {
        "pixels": torch.zeros(60, dtype=torch.uint8),
        "places": torch.tensor([[0, 4, 5]]),
        "boxes": torch.tensor([[0, 0, 4, 5]]),
        "size": 3,
    }
    assert resized_crop(**arguments).shape == (1, 3, 3, 3)
    with pytest.raises(error, match=sentence):
        resized_crop(**(arguments | changes))
