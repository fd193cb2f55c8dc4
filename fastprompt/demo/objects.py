"""What the demo's pictures show: objects (colour x texture x shape) and the clutter that is never the answer.

Everything is drawn with Pillow on a canvas of twice the final size; the caller halves it, which smooths the edges.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "blue": (45, 85, 210),
    "green": (50, 160, 60),
    "orange": (240, 135, 25),
    "pink": (240, 130, 180),
    "purple": (135, 60, 180),
    "red": (215, 40, 40),
    "teal": (30, 165, 165),
    "yellow": (240, 215, 40),
}
TEXTURES = ("checkered", "dotted", "plain", "striped")
SHAPES = ("circle", "cross", "moon", "ring", "star", "triangle")

# Never in a class list and never named in a pretraining caption.
UNKNOWN_COLOURS: dict[str, tuple[int, int, int]] = {
    "brown": (115, 72, 40),
    "gray": (135, 135, 135),
    "white": (240, 240, 240),
}
UNKNOWN_SHAPES = ("arrow", "bolt", "heart", "hourglass", "square")
UNKNOWN_TEXTURES = ("framed", "zigzag")

CLUTTER = ("bubbles", "confetti", "leaves", "pebbles", "sticks")
INK = (60, 60, 60)
RIM = (30, 28, 36)  # of objects that are not drawn in ink


@dataclass(frozen=True)
class ObjectSpec:
    """One object: a colour, a texture and a shape, each by name."""

    colour: str
    texture: str
    shape: str

    @property
    def name(self) -> str:
        """The class name, such as "red striped star"."""
        return f"{self.colour} {self.texture} {self.shape}"


def _regular(points: int, turn: float = -90.0, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
    angles = np.radians(turn + 360.0 * np.arange(points) / points)
    return np.array(radii)[np.arange(points) % len(radii), None] * np.stack([np.cos(angles), np.sin(angles)], 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, (-y - 2.5) / 15], 1)


def _moon() -> np.ndarray:
    outer = np.radians(np.linspace(50, 310, 30))
    outline = np.stack([np.cos(outer), np.sin(outer)], 1)
    inner = np.radians(np.linspace(285, 75, 30))
    bite = np.stack([0.62 + 0.8 * np.cos(inner), 0.8 * np.sin(inner)], 1)
    return np.concatenate([outline, bite]) + np.array([0.15, 0])


_CROSS = [(-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35)]
_ARROW = [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)]
_BOLT = [(-0.1, -1), (0.6, -1), (0.2, -0.2), (0.7, -0.2), (-0.5, 1), (-0.1, 0.1), (-0.6, 0.1)]
OUTLINES: dict[str, np.ndarray] = {
    "circle": _regular(36),
    "cross": np.array([*_CROSS, *((-x, -y) for x, y in _CROSS)]),
    "heart": _heart(),
    "moon": _moon(),
    "ring": _regular(36),
    "square": 1.2 * _regular(4, 45.0),
    "star": 1.1 * _regular(10, radii=(1.0, 0.45)),
    "triangle": 1.1 * _regular(3) + [0, 0.2],
    "arrow": np.array(_ARROW),
    "bolt": np.array(_BOLT),
    "hourglass": np.array([(-0.8, -1), (0.8, -1), (0.15, 0), (0.8, 1), (-0.8, 1), (-0.15, 0)]),
}
_HOLE = 0.5  # inner radius of a ring


def _pattern(texture: str, side: int, phase: float) -> np.ndarray:
    """Where the second tone goes: (side, side) bool. The period is about a fifth of the object."""
    y, x = np.mgrid[0:side, 0:side] / side * 5.0 + phase
    if texture == "striped":
        return y % 1.0 < 0.5
    if texture == "checkered":
        return (x * 0.8 % 1.0 < 0.5) ^ (y * 0.8 % 1.0 < 0.5)
    if texture == "dotted":
        return (x % 1.0 - 0.5) ** 2 + (y % 1.0 - 0.5) ** 2 < 0.09
    if texture == "zigzag":
        return (y + 0.5 * np.abs(x % 2.0 - 1.0)) % 1.0 < 0.4
    if texture == "framed":
        return np.maximum(np.abs(x - x.mean()), np.abs(y - y.mean())) < 1.2
    return np.zeros((side, side), bool)


def jitter(colour: tuple[int, int, int], rng: np.random.Generator, spread: float = 14.0) -> np.ndarray:
    """The colour (3,) under another light: scaled as a whole and moved by channel."""
    return np.clip(np.array(colour) * rng.uniform(0.82, 1.08) + rng.uniform(-spread, spread, 3), 0, 255)


def draw_object(
    canvas: Image.Image, spec: ObjectSpec, centre: tuple[int, int], width: int, drawing: bool, rng: np.random.Generator
) -> None:
    """Draws the object on the canvas, `width` pixels wide (about: shapes differ), turned by up to 10 degrees."""
    angle = math.radians(rng.uniform(-10, 10))
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    side = int(width * 1.3)
    points = [tuple(p) for p in OUTLINES[spec.shape] @ turn * width / 2 + side / 2]
    hole = [tuple(p) for p in _HOLE * OUTLINES["ring"] * width / 2 + side / 2] if spec.shape == "ring" else None
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    pen.polygon(points, fill=255)
    if hole:
        pen.polygon(hole, fill=0)

    first = jitter((COLOURS | UNKNOWN_COLOURS)[spec.colour], rng)
    light = jitter((245, 240, 230), rng, 8.0)
    second = _pattern(spec.texture, side, rng.uniform(0, 1))
    # In a drawing the inside is paper; the pattern and the outline are coloured ink.
    tones = np.where(second[..., None], first, light) if drawing else np.where(second[..., None], light, first)
    picture = Image.fromarray(tones.astype(np.uint8))
    rim = tuple(int(v) for v in first) if drawing else RIM
    pen = ImageDraw.Draw(picture)
    for outline in (points, hole) if hole else (points,):
        pen.line([*outline, outline[0], outline[1]], fill=rim, width=max(8, width // 8))
    corner = (centre[0] - side // 2, centre[1] - side // 2)
    canvas.paste(picture, corner, mask)


def _earthy(kind: str, rng: np.random.Generator) -> tuple[int, ...]:
    """A colour that fits the kind of clutter; confetti comes in the colours of the objects."""
    if kind == "confetti":
        base = list(COLOURS.values())[rng.integers(len(COLOURS))]
    elif kind == "leaves":
        base = [(95, 130, 60), (140, 150, 60), (165, 110, 50)][rng.integers(3)]
    elif kind == "sticks":
        base = [(110, 75, 45), (150, 115, 75), (80, 65, 55)][rng.integers(3)]
    else:
        base = [(150, 145, 140), (120, 115, 110), (175, 165, 150)][rng.integers(3)]
    return tuple(int(v) for v in jitter(base, rng))


def draw_clutter(canvas: Image.Image, kind: str, amount: int, drawing: bool, rng: np.random.Generator) -> None:
    """Scatters `amount` things of one kind over the canvas; in a drawing they are grey outlines."""
    pen = ImageDraw.Draw(canvas)
    for x, y, size, angle in rng.uniform((0, 0, 10, 0), (*canvas.size, 22, math.tau), (amount, 4)):
        colour = _earthy(kind, rng)
        along, across = (
            size * np.array([math.cos(angle), math.sin(angle)]),
            size * np.array([-math.sin(angle), math.cos(angle)]),
        )
        at = np.array([x, y])
        if kind == "sticks":
            pen.line(
                [tuple(at - 1.4 * along), tuple(at + 1.4 * along)],
                fill=INK if drawing else colour,
                width=2 if drawing else 5,
            )
            continue
        if kind == "bubbles":
            pen.ellipse([x - size, y - size, x + size, y + size], outline=INK if drawing else colour, width=3)
            continue
        if kind == "leaves":
            corners = [at - 1.3 * along, at + 0.5 * across, at + 1.3 * along, at - 0.5 * across]
        elif kind == "confetti":
            corners = [
                at + 0.5 * a + 0.35 * b
                for a, b in ((along, across), (along, -across), (-along, -across), (-along, across))
            ]
        else:
            angles = np.linspace(0, math.tau, 10, endpoint=False)
            corners = at + 0.8 * np.cos(angles)[:, None] * along + 0.6 * np.sin(angles)[:, None] * across
        pen.polygon([tuple(c) for c in corners], fill=None if drawing else colour, outline=INK if drawing else None)
