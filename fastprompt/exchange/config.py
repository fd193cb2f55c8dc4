"""What import, export and words are asked for. The command line is made from these classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fastprompt.experiment.config import BackboneConfig, Config, PlaceConfig, Run


@dataclass(frozen=True, kw_only=True)
class ImportConfig(Config):
    """Turn a checkpoint of CoOp, CoCoOp, KgCoOp, ProGrad, PLOT (model.pth.tar-N) or GalLoP (.ckpt) into a run folder.

    Methods of other packages read their own. Nothing in the file is executed. Classes are named here; what the file
    holds of them, embedded names in order, must be the same. ProGrad's becomes coop, which predicts alike. PLOT's has
    no pooled logits: that is as published, except for ImageNet.
    """

    file: Annotated[Positional[Path], arg(metavar="CHECKPOINT")]
    """The checkpoint."""
    out: Path
    """Run folder to write."""
    data: Path | None = None
    """Data folder that it was trained on: gives the class names, and is what evaluate tests on.
    Default: none; then --class-names are needed, and evaluate is given a folder."""
    class_names: Path | None = None
    """Text file with one class name a line, in the order of the labels. Default: the names of the
    classes in --data."""
    split_file: Path | None = None
    """CoOp split file. Default: the one in the data folder, if there is one."""
    keep_underscores: bool | None = None
    """Read class names as written. Default: as the checkpoint's own code does, which is yes for GalLoP alone."""
    classes: Literal["all", "base"] = "all"
    """base: the checkpoint knows only the first half of the data folder's classes."""
    position: Literal["end", "middle", "front"] = "end"
    """Where CoOp's class name stood, which its checkpoint does not say."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    place: PlaceConfig = field(default_factory=PlaceConfig)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Write the classifier of a run for use without this library."""

    run: Run
    """Run folder."""
    out: Path | None = None
    """.safetensors: matrix (C, D) and preprocessing; .onnx: images in, logits out. Default: head.safetensors in RUN."""
    force: bool = False
    """Replace a file that exists and holds something else. A run's own files are never replaced."""
    class_names: tuple[str, ...] = ()
    """Classes of the classifier. Default: those of the run."""
    device: str | None = None
    """Where it runs. Default: cuda if there is one."""


@dataclass(frozen=True, kw_only=True)
class WordsConfig(Config):
    """Show the words whose token embeddings are nearest to each learned context token. They rarely mean anything."""

    run: Run
    """Run folder."""
    top: int = 3
    """How many words for each token."""
    device: str | None = None
    """Where it runs. Default: cuda if there is one."""
