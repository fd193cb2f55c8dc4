"""What an experiment is asked for. The command line is made from these classes, so their comments are its help."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, arg

from fastprompt.documents import check_number, home_path
from fastprompt.errors import InputError

if TYPE_CHECKING:
    from fastprompt.training import TrainingSettings


LOCAL = "local-dir:"

# Positional arguments by the names that the help gives them.
Data = Annotated[Positional[Path], arg(metavar="DATA")]
Run = Annotated[Positional[Path], arg(metavar="RUN")]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all of them share: numbers that are numbers and fit into 64 bits, and paths without ``~``.

    Raises:
        InputError: a number is not finite or too large, or a path names an unknown user.
    """

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            check_number(value, setting.name)
            if isinstance(value, Path):
                object.__setattr__(self, setting.name, home_path(value))
            if isinstance(value, tuple):
                found = tuple(home_path(one) if isinstance(one, Path) else one for one in value)
                object.__setattr__(self, setting.name, found)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(Config):
    """Which frozen model, and where it runs."""

    backbone: str = "ViT-B-16-quickgelu"
    """open_clip architecture, "hf-hub:org/model", "local-dir:folder", or "demo" for the small built-in model."""
    pretrained: str | None = None
    """open_clip tag (such as openai; downloaded once) or a .safetensors file. Not used with the last three,
    needed by all others."""
    device: str | None = None
    """Where it runs, such as cpu or cuda:0. Default: cuda if there is one."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Precision of the frozen weights; learned tensors are always float32."""
    patch_features: Literal["value", "published"] = "value"
    """value: as in GalLoP's code, from the value path. published: as in PLOT's, by attention pooling, which CLIP's
    ResNets alone have."""
    weights_dir: Path | None = None
    """Where downloaded weights are kept. Default: open_clip's own folder."""

    def backbone_and_weights(self) -> tuple[str, str | None]:
        """Name and weights of the backbone, with absolute paths: a run is used from other folders, too."""
        name, weights = self.backbone, self.pretrained
        if name.startswith(LOCAL):
            name = f"{LOCAL}{home_path(name.removeprefix(LOCAL)).resolve()}"
        if weights is not None and (file := home_path(weights)).is_file():
            weights = str(file.resolve())
        return name, weights


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(Config):
    """How images become features."""

    cache: bool = True
    """Keep features on disk, so that every image is encoded once."""
    cache_dir: Path | None = None
    """Folder of the feature cache. Default: $FASTPROMPT_CACHE or ~/.cache/fastprompt."""
    image_batch: int = 32
    """Images that the image tower encodes at a time."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Which images."""

    data: Data
    """Folder of class folders (directly, or in train/ and test/), or dataset folder with a CoOp split file."""
    split_file: Path | None = None
    """CoOp split file. Default: the one in the data folder, if there is one."""
    keep_underscores: bool = False
    """Read class names as written, as GalLoP's code does, instead of turning underscores into spaces."""


@dataclass(frozen=True, kw_only=True)
class TextConfig(Config):
    """How the text encoder shares out its work."""

    memory_budget: int | Literal["auto"] = "auto"
    """Bytes that the text encoder may take; what does not fit is encoded in pieces. auto: half of the free memory."""
    cuda_graphs: bool = False
    """On a GPU, replay passes of the text encoder. The memory of two stays taken; its gain is not measured."""


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(DataConfig, TextConfig, BackboneConfig, FeatureConfig):
    """What every method is asked for. ``methods.train_config`` adds the options of one."""

    method: ClassVar[str]
    own_options: ClassVar[tuple[str, ...]]
    files: ClassVar[tuple[str, ...]]  # those of its own options that name files
    made_for: ClassVar[str]

    recipe: str = "default"
    """Published settings to start from: default, few-shot, a data set such as imagenet, or a .json file that
    `fastprompt recipes copy` wrote. `fastprompt recipes ls` lists them."""

    classes: Literal["all", "base"] = "all"
    """base: know only the first half of the classes, and test on both halves (base-to-new)."""
    out: Path | None = None
    """Run folder. Default: runs/DATASET/METHOD/BACKBONE/... An unfinished run there is resumed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe != self.made_for:
            raise InputError(f"recipe: this configuration was made for {self.made_for!r}, got {self.recipe!r}")

    @property
    def run_name(self) -> str:
        """Last part of the default run folder."""
        return self.classes

    def learner_options(self) -> dict[str, Any]:
        """Arguments of the method's learner, files with absolute paths: a run is used from other folders, too."""
        options = {name: getattr(self, name) for name in self.own_options}
        return options | {name: str(file) for name, file in self.learner_files().items()}

    def learner_files(self) -> dict[str, Path]:
        """The files that the method's learner reads, by the options that name them."""
        given = {name: getattr(self, name) for name in self.files}
        return {name: home_path(file).resolve() for name, file in given.items() if file is not None}

    def settings(self) -> TrainingSettings | None:
        """How the learner is trained; None where nothing is."""
        return None

    def resolved(self) -> dict[str, Any]:
        """What decides the result: everything but where it runs, how images are read, and where files go."""
        elsewhere = {field.name for field in fields(FeatureConfig)}
        elsewhere |= {"device", "weights_dir", "memory_budget", "cuda_graphs", "out", "image_memory"}
        chosen = {name: value for name, value in asdict(self).items() if name not in elsewhere}
        chosen |= {name: path.resolve() for name, path in chosen.items() if isinstance(path, Path)}
        chosen |= self.learner_options()
        chosen["backbone"], chosen["pretrained"] = self.backbone_and_weights()
        if self.recipe.endswith(".json"):
            chosen["recipe"] = home_path(self.recipe).resolve()
        settings = self.settings()
        return {"method": self.method, **chosen, **({} if settings is None else asdict(settings))}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ExperimentConfig):
    """What a method that learns is asked for."""

    shots: int = 16
    """Training images per class; 0 for all of them."""
    sampler: Literal["exact", "published", "stratified"] = "exact"
    """exact: that many of every class. published: the very images that CoOp's code draws for this seed and split file.
    stratified: in proportion to class sizes (GalLoP's code)."""
    seed: int = 1
    """Which images are drawn, in which order they come, and all other random choices."""
    augment: bool = False
    """Random crops and flips, as published, resized as by Pillow up to version 12; every image is then encoded anew in
    every epoch, without the cache."""
    views: int = 0
    """With --augment: so many random views of every image are encoded once and cached, and every epoch takes one of
    them at random. 0: every epoch has crops of its own."""
    image_memory: float = 4.0
    """With --augment: GB that decoded training images may take. If they do not fit, every epoch decodes them anew."""
    epochs: int | None = None
    """Passes over the training images. Default: as in the recipe, for the number of shots."""
    batch_size: int | None = None
    """Images per step. Default: as in the recipe."""
    lr: float | None = None
    """Learning rate of SGD. Default: as in the recipe."""
    weight_decay: float | None = None
    """Weight decay of SGD. Default: as in the recipe."""
    zero_shot_template: str = "a photo of a {}."
    """Sentence of the zero-shot row that the result is compared with. Default: the one of the recipe's data set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views < 0 or (self.views and not self.augment):
            raise InputError(f"views: expected at least 0, and 0 without --augment, got {self.views}")
        if self.views and not self.cache:
            raise InputError(f"views: {self.views} views are kept in the feature cache, but --no-cache is given")

    @property
    def run_name(self) -> str:
        """Such as shots16-seed1, or shots16-seed1-base."""
        shots = f"shots{self.shots}" if self.shots else "all"
        return f"{shots}-seed{self.seed}" + ("" if self.classes == "all" else f"-{self.classes}")

    def settings(self) -> TrainingSettings:
        """The settings of the recipe, with what was given instead."""
        from fastprompt.learners import find_method  # brings torch
        from fastprompt.learners.recipe import find_recipe
        from fastprompt.training import published_settings

        given = {name: getattr(self, name) for name in ("epochs", "batch_size", "lr", "weight_decay")}
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("epochs") == 1:
            given["warmup_epochs"] = 0  # a single epoch of warm-up would train nothing
        recipe = find_recipe(find_method(self.method), self.recipe)
        return replace(published_settings(recipe, self.shots or None), seed=self.seed, **given)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(FeatureConfig):
    """Test a finished run: on its own data, on other classes, on another data set, or against unknown objects."""

    run: Run
    """Run folder that train wrote."""
    data: Annotated[Positional[Path | None], arg(metavar="[DATA]")] = None
    """Data folder to test on. Default: the one that the run was trained on."""
    split: Literal["train", "val", "test", "all"] = "test"
    """Which images of it."""
    classes: Literal["all", "base", "new"] = "all"
    """Which classes of it: all, the first half, or the second half."""
    ood: Path | None = None
    """Folder of images of no class, at any depth; adds how well they are told apart (FPR95, AUROC).
    Default: only images of the classes are tested."""
    ood_kind: Literal["mcm", "l-mcm", "gl-mcm"] = "gl-mcm"
    """Out-of-distribution score: of the image, of its patches, or both."""
    fpr_rule: Literal["standard", "gallop"] = "standard"
    """FPR95 with the threshold that keeps at least 95 % of the known images, or as in GalLoP's and GL-MCM's code, with
    the loosest one that keeps a share as near to 95 % as can be: higher, on few images."""
    device: str | None = None
    """Where it runs. Default: cuda if there is one."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Config):
    """Name what is on images."""

    run: Run
    """Run folder that train wrote."""
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE [IMAGE ...]")]
    """Image files, or folders of images."""
    top: int = 3
    """How many classes to show."""
    class_names: tuple[str, ...] = ()
    """Classes to choose from, in the learned context. Default: those of the run."""
    device: str | None = None
    """Where it runs. Default: cuda if there is one."""


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(Config):
    """Draw the patches that speak for a class over the image.

    Which these are is the method's own: those that it keeps to score the image, or else those more similar to the
    class's text than the image's mean patch.
    """

    run: Run
    """Run folder that train wrote."""
    image: Annotated[Positional[Path], arg(metavar="IMAGE")]
    """Image file."""
    class_name: str | None = None
    """Class to explain. Default: the predicted one."""
    out: Path | None = None
    """PNG file to write. Default: explained/IMAGE-CLASS.png in the run folder."""
    device: str | None = None
    """Where it runs. Default: cuda if there is one."""
