"""Scenes: cluttered pictures of which the named object is a small part; the demo's classes, and its data set on disk.

A scene is decided first (`Scene`, plain data) and drawn afterwards (`render`), both from a seeded generator, so that
one seed gives one picture.

The 64 downstream classes (`DEMO_CLASSES`) are combinations of colour, texture and shape that pretraining
(`fastprompt.demo.pretrain`) never renders: it uses the other 128 combinations of the same eight colours, four textures
and six shapes, and seeds of its own. Nor does it render any unknown shape, colour or texture.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from fastprompt.demo.objects import (
    CLUTTER,
    COLOURS,
    SHAPES,
    TEXTURES,
    UNKNOWN_COLOURS,
    UNKNOWN_SHAPES,
    UNKNOWN_TEXTURES,
    ObjectSpec,
    draw_clutter,
    draw_object,
)
from fastprompt.progress import progress_bar, say_line

IMAGE_SIZE = 128  # pixels, square
DATASET_SEED = 407_000  # first number of every generator behind the data set; pretraining has another
STYLES = ("photo", "drawing", "night", "blurry")
DOMAINS = ("drawing", "night")


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `objects[0]` is the named one; widths are in pixels of the final picture."""

    objects: tuple[ObjectSpec, ...]
    widths: tuple[int, ...]
    style: str
    clutter: tuple[str, ...]
    amount: int


def _all_specs() -> list[ObjectSpec]:
    return [ObjectSpec(c, t, s) for c in COLOURS for t in TEXTURES for s in SHAPES]


def _is_demo_class(spec: ObjectSpec) -> bool:
    """For each colour four of the six shapes, each in two of the textures: no two of the three words tell the class."""
    colour, texture, shape = list(COLOURS).index(spec.colour), TEXTURES.index(spec.texture), SHAPES.index(spec.shape)
    return (colour + shape) % 3 != 0 and (texture + colour // 2) % 2 == 0


DEMO_CLASSES: tuple[ObjectSpec, ...] = tuple(sorted(filter(_is_demo_class, _all_specs()), key=lambda s: s.name))
PRETRAIN_CLASSES: tuple[ObjectSpec, ...] = tuple(s for s in _all_specs() if not _is_demo_class(s))


def unknown_object(rng: np.random.Generator) -> ObjectSpec:
    """An object of no class: its shape is in no list, and its colour or texture often is not either."""
    colours = tuple(UNKNOWN_COLOURS) if rng.random() < 0.5 else tuple(COLOURS)
    textures = UNKNOWN_TEXTURES if rng.random() < 0.5 else TEXTURES
    return ObjectSpec(str(rng.choice(colours)), str(rng.choice(textures)), str(rng.choice(UNKNOWN_SHAPES)))


def demo_scene(spec: ObjectSpec, style: str, rng: np.random.Generator) -> Scene:
    """The downstream corner: a small object in heavy clutter of two kinds."""
    kinds = rng.choice(CLUTTER, 2, replace=False)
    return Scene((spec,), (int(rng.integers(24, 35)),), style, tuple(map(str, kinds)), int(rng.integers(40, 61)))


def _background(style: str, rng: np.random.Generator) -> Image.Image:
    if style == "drawing":
        return Image.new("RGB", (2 * IMAGE_SIZE,) * 2, tuple(int(v) for v in rng.uniform(232, 255, 3)))
    tone = rng.uniform(125, 215) + rng.uniform(-25, 25, 3)
    coarse = np.clip(tone + rng.uniform(-35, 35, (4, 4, 1)) + rng.uniform(-10, 10, (4, 4, 3)), 0, 255)
    return Image.fromarray(coarse.astype(np.uint8)).resize((2 * IMAGE_SIZE,) * 2, Image.Resampling.BICUBIC)


def _place(widths: tuple[int, ...], rng: np.random.Generator) -> list[tuple[int, int]]:
    """A centre for each object: inside the picture, and apart from those before it where twenty tries find room."""
    centres: list[tuple[int, int]] = []
    for i, width in enumerate(widths):
        margin = min(int(0.6 * width), IMAGE_SIZE // 2 - 4)
        for _ in range(20):
            x, y = (int(v) for v in rng.integers(margin, IMAGE_SIZE - margin, 2))
            if all(
                (x - u) ** 2 + (y - v) ** 2 > (0.6 * (width + widths[j])) ** 2 for j, (u, v) in enumerate(centres[:i])
            ):
                break
        centres.append((x, y))
    return centres


def render(scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """Draws a scene.

    Returns:
        The picture (RGB, `IMAGE_SIZE` square) and the named object's box (left, top, right, bottom) in pixels.
    """
    drawing = scene.style == "drawing"
    canvas = _background(scene.style, rng)
    for kind in scene.clutter:
        draw_clutter(canvas, kind, scene.amount // len(scene.clutter), drawing, rng)
    centres = _place(scene.widths, rng)
    for spec, width, (x, y) in reversed(list(zip(scene.objects, scene.widths, centres, strict=True))):
        draw_object(canvas, spec, (2 * x, 2 * y), 2 * width, drawing, rng)
    picture = canvas.reduce(2)
    if scene.style == "blurry":
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(1.0, 2.0)))
    pixels = np.asarray(picture, np.float32)
    noise = 4.0
    if scene.style == "night":
        pixels = pixels * np.array([0.34, 0.38, 0.52], np.float32)
        noise = 9.0
    pixels = pixels + noise * rng.standard_normal(pixels.shape, np.float32)
    half, (x, y) = int(0.6 * scene.widths[0]), centres[0]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), (x - half, y - half, x + half, y + half)


def write_dataset(
    root: Path, seed: int = 0, train: int = 24, test: int = 24, domain_test: int = 12, ood: int = 480
) -> Path:
    """Renders the downstream data set as folders of JPEG files; the same arguments write the same pictures.

    Writes `train/<class>/`, `test/<class>/` and `domains/<domain>/<class>/` with that many pictures of each class, and
    `ood/unknown/` with `ood` pictures of objects that are in no class.

    Returns:
        `root`.
    """
    jobs = [(f"train/{spec.name}", spec, "photo", train) for spec in DEMO_CLASSES]
    jobs += [(f"test/{spec.name}", spec, "photo", test) for spec in DEMO_CLASSES]
    jobs += [
        (f"domains/{domain}/{spec.name}", spec, domain, domain_test) for domain in DOMAINS for spec in DEMO_CLASSES
    ]
    jobs += [("ood/unknown", None, "photo", ood)]
    total = sum(job[3] for job in jobs)
    with progress_bar(what="rendering scenes", shown=True, total=total, unit="picture") as progress:
        say_line(f"rendering {total} scenes", progress, shown=True)
        for number, (folder, spec, style, count) in enumerate(jobs):
            (root / folder).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                rng = np.random.default_rng((DATASET_SEED, seed, number, i))
                picture, _ = render(demo_scene(spec or unknown_object(rng), style, rng), rng)
                picture.save(root / folder / f"{i:04d}.jpg", quality=92, subsampling=0)
            progress.update(count)
    return root
