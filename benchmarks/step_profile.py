"""Where the time of our own training step goes: the parts of a step beside the step as a whole."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import results
from benchmarks.measure import Shape
from benchmarks.train_step import SGD, Workload, workload
from fastprompt.backbone import ImageFeatures
from fastprompt.data import DecodedImages, draw_crops
from fastprompt.evaluation import Row
from fastprompt.experiment.augmentation import cut
from fastprompt.report import Column, Table
from fastprompt.report.style import INK, PALETTE, new_figure, style_axes

IMAGES, CACHED = "images", "cached features"
# In the order of a step; colour and opacity.
PARTS = {
    "data": (PALETTE[5], 1.0),
    "image tower": (PALETTE[0], 1.0),
    "text forward": (PALETTE[1], 1.0),
    "similarity": (PALETTE[2], 1.0),
    "loss": (PALETTE[3], 1.0),
    "similarity backward": (PALETTE[2], 0.6),
    "text backward": (PALETTE[1], 0.6),
    "optimizer": (PALETTE[4], 1.0),
}
WARM_UP, MIN_ROUNDS, MAX_ROUNDS, SECONDS = 2, 5, 40, 8.0
STORED, PICTURE = 256, (300, 400)  # images that a batch is taken from; height and width of each

Mark = Callable[[str], None]


@dataclass
class Clock:
    """Times of the parts of one step, by the device's own clock where it has one. A part ends where it is marked."""

    device: torch.device
    marks: list[tuple[str, float | torch.cuda.Event]] = field(default_factory=list)

    def mark(self, part: str) -> None:
        """Everything since the last mark was this part."""
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((part, now))

    def milliseconds(self) -> dict[str, float]:
        """By part; what comes before the first mark is no part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        parts: dict[str, float] = {}
        for (_, start), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            took = start.elapsed_time(end) if self.device.type == "cuda" else 1e3 * (end - start)
            parts[part] = parts.get(part, 0.0) + took
        return parts


@dataclass(frozen=True)
class Profile:
    """Median milliseconds.

    Attributes:
        features: whether images are computed or features are cached.
        parts: by name.
        step: of the step as a whole, timed in other rounds without any mark inside.
    """

    features: str
    parts: Mapping[str, float]
    step: float

    @property
    def explained(self) -> float:
        """Share of the step that its parts add up to."""
        return sum(self.parts.values()) / self.step


def profile(shape: Shape, device: torch.device) -> list[Profile]:
    """Profile our step with images computed from decoded pictures, and with cached features."""
    work = workload(shape, device)
    profiles = []
    for features, load in ((IMAGES, _crops(work, shape["B"])), (CACHED, _rows(work, shape["B"]))):
        step = _Step(work, load)
        steps, parts = [], []
        end = time.perf_counter() + SECONDS
        for done in range(WARM_UP + MAX_ROUNDS):
            if done >= WARM_UP + MIN_ROUNDS and time.perf_counter() > end:
                break
            whole, inside = Clock(device), Clock(device)
            whole.mark("start")
            step.run(lambda part: None)
            whole.mark("step")
            step.run(inside.mark)
            if done >= WARM_UP:
                steps.append(whole.milliseconds()["step"])
                parts.append(inside.milliseconds())
        medians = {name: median(one[name] for one in parts) for name in PARTS}
        profiles.append(Profile(features, medians, median(steps)))
    return profiles


class _Step:
    """A training step as ``fastprompt.training`` takes it, which says where one part ends and the next begins.

    The library is not changed for that: the text encoder of the learner is called through a function that marks its
    end, and a hook on its result marks when the backward pass arrives there.
    """

    def __init__(self, work: Workload, load: Callable[[], Tensor | ImageFeatures]) -> None:
        self.learner, self.backbone, self.load = work.learner, work.backbone, load
        self.labels = work.task.labels.repeat(work.task.copies)
        self.optimizer = SGD(self.learner.parameters())
        self.mark: Mark = lambda part: None
        encode = type(self.learner).encode_text
        self.learner.encode_text = lambda: self._at_seams(encode(self.learner))

    def _at_seams(self, text: Tensor) -> Tensor:
        text.register_hook(lambda grad: self.mark("similarity backward"))
        self.mark("text forward")
        return text

    def run(self, mark: Mark) -> None:
        """One step."""
        self.mark = mark
        mark("start")
        loaded = self.load()
        mark("data")
        with torch.no_grad():
            features = loaded if isinstance(loaded, ImageFeatures) else self.backbone.encode_images(loaded)
        mark("image tower")
        scores = self.learner(features)
        mark("similarity")
        loss = self.learner.loss(scores, self.labels)
        mark("loss")
        self.optimizer.zero_grad()
        loss.backward()
        mark("text backward")
        self.optimizer.step()
        mark("optimizer")


def _crops(work: Workload, images: int) -> Callable[[], Tensor]:
    """Random crops of pictures that were decoded once."""
    height, width = PICTURE
    size = 3 * height * width
    pixels = torch.randint(256, (STORED * size,), dtype=torch.uint8)
    places = torch.tensor([(size * index, height, width) for index in range(STORED)])
    stored, generator = DecodedImages(pixels, places).to(work.backbone.device), torch.Generator()

    def load() -> Tensor:
        chosen = stored[torch.randint(STORED, (images,))]
        return cut(chosen, draw_crops(chosen.places[:, 1:], generator), work.backbone)

    return load


def _rows(work: Workload, images: int) -> Callable[[], ImageFeatures]:
    """Rows of features that lie in the host's memory."""
    backbone = work.backbone
    grid = backbone.patch_grid
    pooled = F.normalize(torch.randn(STORED, backbone.embed_dim), dim=-1)
    patches = torch.randn(STORED, grid[0] * grid[1], backbone.patch_width).to(backbone.dtype)
    stored = ImageFeatures(pooled, patches)
    return lambda: stored[torch.randint(STORED, (images,))].to(backbone.device)


def write(shape: Shape, device: torch.device, profiles: Sequence[Profile], file: Path) -> None:
    """Append one row a part to a CSV file."""
    fixed = {**results.setting(device), **{name: value for name, value in shape.items() if name != "share"}}  # of peers
    rows = []
    for one in profiles:
        for part, took in {**one.parts, "step": one.step}.items():
            share = f"{took / one.step:.4f}"
            rows.append({**fixed, "features": one.features, "part": part, "median_ms": f"{took:.3f}", "share": share})
    results.append_rows(file, rows)


def table(shape: Shape, profiles: Sequence[Profile]) -> Table:
    """For the screen."""
    columns = (
        *(Column(part, "ms", ".1f") for part in PARTS),
        Column("step", "ms", ".1f"),
        Column("explained", "%", ".1f"),
    )
    rows = [Row(one.features, (*one.parts.values(), one.step, 100 * one.explained)) for one in profiles]
    return Table(_title(shape), tuple(columns), tuple(rows), label_title="features")


def _title(shape: Shape) -> str:
    names = ("dtype", "B", "C")
    return f"Where a training step of GalLoP goes, {', '.join(f'{name}={shape[name]}' for name in names)}"


def draw(file: Path) -> list[Path]:
    """Draw the newest rows of a file as stacked bars, one picture a device, beside the file."""
    rows = results.read_rows(file)
    written = []
    for device in dict.fromkeys(row["device"] for row in rows):
        bars: dict[str, dict[str, float]] = {}
        for row in (row for row in rows if row["device"] == device):  # the last row is the newest
            bar = f"{row['features']}\n{row['dtype']}, B={row['B']}, C={row['C']}"
            bars.setdefault(bar, {})[row["part"]] = float(row["median_ms"])
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        path = file.with_name(f"{file.stem}-{slug}.png")
        _figure(f"A training step of GalLoP, ViT-B/16, {device}", bars).savefig(path, dpi=130)
        written.append(path)
    return written


def _figure(title: str, bars: Mapping[str, Mapping[str, float]]) -> Figure:
    figure = new_figure(8, 1.6 + 0.55 * len(bars))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    style_axes(axes)
    axes.grid(visible=False)
    axes.set_title(title, fontsize=9, color=INK)
    axes.set_xlabel("Milliseconds; behind the bar the step, timed as a whole, and how much of it the parts explain",
                    fontsize=8, color=INK)  # fmt: skip
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    for place, parts in enumerate(bars.values()):
        left = 0.0
        for part, (colour, alpha) in PARTS.items():
            axes.barh(place, parts[part], left=left, height=0.6, color=colour, alpha=alpha, linewidth=0,
                      label=part if place == 0 else None)  # fmt: skip
            left += parts[part]
        said = f" {parts['step']:.0f} ms, {left / parts['step']:.1%}"
        axes.text(max(left, parts["step"]), place, said, va="center", fontsize=8, color=INK)
    axes.margins(x=0.2)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8, labelcolor=INK)
    return figure
