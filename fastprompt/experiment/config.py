"""What an experiment is asked for. The command line is made from these classes, so their comments are its help."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tyro.conf import Positional

if TYPE_CHECKING:
    from fastprompt.training import TrainingSettings


LOCAL = "local-dir:"


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which frozen model, and where it runs."""

    backbone: str = "ViT-B-16-quickgelu"
    """open_clip architecture, "hf-hub:org/model", "local-dir:folder", or "demo" for the small built-in model."""
    pretrained: str | None = None
    """open_clip tag (such as openai; downloaded once) or a .safetensors file. Not used with the last three."""
    device: str | None = None
    """Where it runs, such as cpu or cuda:0. Default: cuda if there is one."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Precision of the frozen weights; learned tensors are always float32."""
    weights_dir: Path | None = None
    """Where downloaded weights are kept. Default: open_clip's own folder."""
    memory_budget: int | Literal["auto"] = "auto"
    """Bytes that the text encoder may take; what does not fit is encoded in pieces. auto: half of the free memory."""


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """How images become features."""

    cache: bool = True
    """Keep features on disk, so that every image is encoded once."""
    cache_dir: Path | None = None
    """Folder of the feature cache. Default: $FASTPROMPT_CACHE or ~/.cache/fastprompt."""
    image_batch: int = 32
    """Images that the image tower encodes at a time."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images."""

    data: Positional[Path]
    """Folder of class folders (directly, or in train/ and test/), or dataset folder with a CoOp split file."""
    split_file: Path | None = None
    """CoOp split file. Default: the one in the data folder, if there is one."""
    keep_underscores: bool = False
    """Read class names as written, as GalLoP's code does, instead of turning underscores into spaces."""


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(DataConfig, BackboneConfig, FeatureConfig):
    """What every method is asked for."""

    method: ClassVar[str]
    own_options: ClassVar[tuple[str, ...]]

    classes: Literal["all", "base"] = "all"
    """base: know only the first half of the classes, and test on both halves (base-to-new)."""
    out: Path | None = None
    """Run folder. Default: runs/DATASET/METHOD/BACKBONE/... An unfinished run there is resumed."""

    @property
    def run_name(self) -> str:
        """Last part of the default run folder."""
        return self.classes

    def learner_options(self) -> dict[str, Any]:
        """Arguments of the method's learner."""
        return {name: getattr(self, name) for name in self.own_options}

    def settings(self) -> TrainingSettings | None:
        """How the learner is trained; None where nothing is."""
        return None

    def backbone_and_weights(self) -> tuple[str, str | None]:
        """Name and weights of the backbone, with absolute paths: a run is used from other folders, too."""
        name, weights = self.backbone, self.pretrained
        if name.startswith(LOCAL):
            name = f"{LOCAL}{Path(name.removeprefix(LOCAL)).expanduser().resolve()}"
        if weights is not None and Path(weights).is_file():
            weights = str(Path(weights).resolve())
        return name, weights

    def resolved(self) -> dict[str, Any]:
        """What decides the result: everything but where it runs, how images are read, and where files go."""
        elsewhere = {*(field.name for field in fields(FeatureConfig)), "device", "weights_dir", "memory_budget", "out"}
        chosen = {name: value for name, value in asdict(self).items() if name not in elsewhere}
        chosen |= {name: path.expanduser().resolve() for name, path in chosen.items() if isinstance(path, Path)}
        chosen["backbone"], chosen["pretrained"] = self.backbone_and_weights()
        settings = self.settings()
        return {"method": self.method, **chosen, **({} if settings is None else asdict(settings))}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ExperimentConfig):
    """What a method that learns is asked for."""

    shots: int = 16
    """Training images per class; 0 for all of them."""
    sampler: Literal["exact", "stratified"] = "exact"
    """exact: that many of every class (CoOp). stratified: in proportion to class sizes (GalLoP's code)."""
    seed: int = 1
    """Which images are drawn, in which order they come, and all other random choices."""
    augment: bool = False
    """Random crops and flips, as published; every image is then encoded anew in every epoch, without the cache."""
    epochs: int | None = None
    """Passes over the training images. Default: as published for the method and the number of shots."""
    batch_size: int | None = None
    """Images per step. Default: as published."""
    lr: float | None = None
    """Learning rate of SGD. Default: as published."""
    weight_decay: float | None = None
    """Weight decay of SGD. Default: as published."""
    zero_shot_template: str = "a photo of a {}."
    """Sentence of the zero-shot row that the result is compared with."""

    @property
    def run_name(self) -> str:
        """Such as shots16-seed1, or shots16-seed1-base."""
        shots = f"shots{self.shots}" if self.shots else "all"
        return f"{shots}-seed{self.seed}" + ("" if self.classes == "all" else f"-{self.classes}")

    def settings(self) -> TrainingSettings:
        """The published training settings, with what was given instead."""
        from fastprompt.training import published_settings  # brings torch

        given = {name: getattr(self, name) for name in ("epochs", "batch_size", "lr", "weight_decay")}
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("epochs") == 1:
            given["warmup_epochs"] = 0  # a single epoch of warm-up would train nothing
        return replace(published_settings(self.method, self.shots or None), seed=self.seed, **given)


@dataclass(frozen=True, kw_only=True)
class TrainGalLoP(TrainConfig):
    """GalLoP: global prompts for the image, local prompts for its best patches at several scales (2407.01400)."""

    method: ClassVar[str] = "gallop"
    own_options: ClassVar[tuple[str, ...]] = ("global_prompts", "k", "dropout", "context")

    global_prompts: int = 4
    """Prompts that are compared with the whole image."""
    k: tuple[int, ...] = (5, 10, 15, 20)
    """Patches that each local prompt keeps: as many local prompts as numbers."""
    dropout: float = 0.75
    """Share of the global prompts left out per image while training."""
    context: int | str = "a photo of a"
    """Words that the contexts start from, or a number of random tokens."""


@dataclass(frozen=True, kw_only=True)
class TrainCoOp(TrainConfig):
    """CoOp: one learned context for all classes (2109.01134)."""

    method: ClassVar[str] = "coop"
    own_options: ClassVar[tuple[str, ...]] = ("context",)

    context: int | str = "a photo of a"
    """Words that the context starts from, or a number of random tokens (16 in the paper's few-shot runs)."""


@dataclass(frozen=True, kw_only=True)
class TrainZeroShot(ExperimentConfig):
    """Zero-shot CLIP: nothing is learned; tests the template and writes a run folder like the others (2103.00020)."""

    method: ClassVar[str] = "zero-shot"
    own_options: ClassVar[tuple[str, ...]] = ("template",)

    template: str = "a photo of a {}."
    """Sentence with one {} for the class name."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(FeatureConfig):
    """Test a finished run: on its own data, on other classes, on another data set, or against unknown objects."""

    run: Positional[Path]
    """Run folder that train wrote."""
    data: Positional[Path | None] = None
    """Data folder to test on. Default: the one that the run was trained on."""
    split: Literal["train", "val", "test", "all"] = "test"
    """Which images of it."""
    classes: Literal["all", "base", "new"] = "all"
    """Which classes of it: all, the first half, or the second half."""
    ood: Path | None = None
    """Folder of images of no class, at any depth; adds how well they are told apart (FPR95, AUROC)."""
    ood_kind: Literal["mcm", "l-mcm", "gl-mcm"] = "gl-mcm"
    """Out-of-distribution score: of the image, of its patches, or both."""
    device: str | None = None
    """Where it runs. Default: cuda if there is one."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Name what is on images."""

    run: Positional[Path]
    """Run folder that train wrote."""
    images: Positional[tuple[Path, ...]]
    """Image files, or folders of images."""
    top: int = 3
    """How many classes to show."""
    device: str | None = None
    """Where it runs. Default: cuda if there is one."""


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Draw the patches that each local prompt of a GalLoP run selected for a class, over the image."""

    run: Positional[Path]
    """Run folder of a GalLoP training."""
    image: Positional[Path]
    """Image file."""
    class_name: str | None = None
    """Class to explain. Default: the predicted one."""
    out: Path | None = None
    """PNG file to write. Default: explained/IMAGE-CLASS.png in the run folder."""
    device: str | None = None
    """Where it runs. Default: cuda if there is one."""
