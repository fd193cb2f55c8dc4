"""What an experiment is asked for. The command line is made from these classes, so their comments are its help."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

from tyro.conf import Positional, arg

from fastprompt.documents import absolute_path, check_number, home_path
from fastprompt.errors import InputError

LOCAL = "local-dir:"

# Positional arguments by the names that the help gives them.
Data = Annotated[Positional[Path], arg(metavar="DATA")]
Run = Annotated[Positional[Path], arg(metavar="RUN")]
PLAIN = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH", bool: "{True,False}"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all of them share: numbers that fit into 64 bits, and paths without ``~``, which may be given as strings.

    Raises:
        InputError: a number is not finite or too large, or a path names an unknown user.
    """

    _paths: ClassVar[frozenset[str]]  # names of the settings that are paths

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Keep None and () out of the help: they stand for a default that the words of a setting tell."""
        super().__init_subclass__(**kwargs)
        hints, kinds = get_type_hints(cls, include_extras=True), get_type_hints(cls)
        cls._paths = frozenset(name for name, kind in kinds.items() if kind in (Path, Path | None))
        for name in cls.__annotations__:
            default = getattr(cls, name, ...)
            default = getattr(default, "default", default)
            types = "|".join(PLAIN[kind] for kind in get_args(kinds[name]) if kind in PLAIN)
            if default == () or (default is None and types):
                said = arg(metavar=None if default == () else types, help_behavior_hint="")
                own = getattr(hints[name], "__metadata__", ())  # behind what is said here, so that it counts
                cls.__annotations__[name] = Annotated[(kinds[name], said, *own)]

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            check_number(value, setting.name)
            if isinstance(value, Path) or (isinstance(value, str) and setting.name in self._paths):
                object.__setattr__(self, setting.name, home_path(value))
            if isinstance(value, tuple):
                found = tuple(home_path(one) if isinstance(one, Path) else one for one in value)
                object.__setattr__(self, setting.name, found)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Which images."""

    data: Data
    """Folder of class folders (directly, or in train/ and test/), or dataset folder with a CoOp split file."""
    split_file: Path | None = None
    """CoOp split file. Default: the one in the data folder, if there is one."""
    keep_underscores: bool = False
    """Read class names as written, as GalLoP's code does, instead of turning underscores into spaces."""
    classes: Literal["all", "base"] = "all"
    """base: know only the first half of the classes, and test on both halves (base-to-new)."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """How it is trained, on how many images, and what the result is compared with."""

    shots: int = 16
    """Training images per class; 0 for all of them."""
    sampler: Literal["exact", "published", "stratified"] = "exact"
    """exact: that many of each class; published: those that CoOp's code draws; stratified: by class size, as GalLoP."""
    seed: int = 1
    """Which images are drawn, in which order they come, and all other random choices."""
    epochs: int | None = None
    """Passes over the training images. Default: as in the recipe, for the number of shots."""
    batch_size: int | None = None
    """Images per step. Default: as in the recipe."""
    lr: float | None = None
    """Learning rate of SGD. Default: as in the recipe."""
    weight_decay: float | None = None
    """Weight decay of SGD. Default: as in the recipe."""
    augment: bool = False
    """Random crops and flips, as published: every image is encoded anew in every epoch, without the cache."""
    views: int = 0
    """With --augment: encode so many views of each image once, of which every epoch takes one. 0: fresh crops."""
    zero_shot_template: str | None = None
    """Sentence of the zero-shot row that the result is compared with. Default: the one of the recipe's data set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views < 0 or (self.views and not self.augment):
            raise InputError(f"views: expected at least 0, and 0 without --augment, got {self.views}")

    def given(self) -> dict[str, Any]:
        """Numbers that stand in place of the recipe's."""
        numbers = {name: getattr(self, name) for name in ("epochs", "batch_size", "lr", "weight_decay")}
        return {name: value for name, value in numbers.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(Config):
    """Which frozen model."""

    backbone: str = "ViT-B-16-quickgelu"
    """open_clip architecture, "hf-hub:org/model", "local-dir:folder", or "demo" for the small built-in model."""
    pretrained: str | None = None
    """open_clip tag (openai; downloaded once) or .safetensors file; needed by all others than the last three."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Precision of the frozen weights; learned tensors are always float32."""
    patch_features: Literal["value", "published"] = "value"
    """value: by the value path, as in GalLoP's code; published: by attention pooling, as in PLOT's (ResNets alone)."""

    def absolute(self) -> dict[str, Any]:
        """The settings with absolute paths: a run is used from other folders, too."""
        name, weights = self.backbone, self.pretrained
        if name.startswith(LOCAL):
            name = f"{LOCAL}{absolute_path(home_path(name.removeprefix(LOCAL)))}"
        if weights is not None and (file := absolute_path(home_path(weights))).is_file():
            weights = str(file)
        return {**asdict(self), "backbone": name, "pretrained": weights}


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(Config):
    """How images become features, and what is kept of them."""

    cache: bool = True
    """Keep features on disk, so that every image is encoded once."""
    cache_dir: Path | None = None
    """Folder of the feature cache. Default: $FASTPROMPT_CACHE or ~/.cache/fastprompt."""
    image_batch: int = 32
    """Images that the image tower encodes at a time."""


@dataclass(frozen=True, kw_only=True)
class PlaceConfig(Config):
    """Where the model runs, and where its weights lie."""

    device: str | None = None
    """Where it runs, such as cpu or cuda:0. Default: cuda if there is one."""
    weights_dir: Path | None = None
    """Where downloaded weights are kept. Default: open_clip's own folder."""

    def loading(self) -> dict[str, Any]:
        """Arguments of ``load_backbone`` that do not change the model."""
        return {"device": self.device, "cache_dir": self.weights_dir}


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(PlaceConfig):
    """Where it runs, and what it may take: nothing here changes the result."""

    memory_budget: int | Literal["auto"] = "auto"
    """Bytes that the text encoder may take; what does not fit is encoded in pieces. auto: half of the free memory."""
    cuda_graphs: bool = False
    """On a GPU, replay passes of the text encoder. The memory of two stays taken; its gain is not measured."""
    image_memory: float = 4.0
    """With --augment: GB that decoded training images may take. If they do not fit, every epoch decodes them anew."""

    def loading(self) -> dict[str, Any]:
        """See ``PlaceConfig``."""
        return super().loading() | {"memory_budget": self.memory_budget, "cuda_graphs": self.cuda_graphs}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Config):
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
    """Folder of images of no class, at any depth, to be told apart (FPR95, AUROC). Default: images of classes alone."""
    ood_kind: Literal["mcm", "l-mcm", "gl-mcm"] = "gl-mcm"
    """Out-of-distribution score: of the image, of its patches, or both."""
    fpr_rule: Literal["standard", "gallop"] = "standard"
    """Threshold of FPR95: keeps at least 95 % of known images, or as near to that as can be (GalLoP, GL-MCM)."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    device: str | None = None
    """Where it runs. Default: cuda if there is one."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Config):
    """Name what is on images."""

    run: Run
    """Run folder that train wrote."""
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(required)")]
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
