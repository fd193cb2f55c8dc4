"""The classifier of a run for use without this library: a matrix with its preprocessing, or ONNX."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from fastprompt_kernels import onnx_decompositions
from torch import Tensor, nn

from fastprompt.backbone import Backbone
from fastprompt.errors import InputError
from fastprompt.exchange.config import ExportConfig
from fastprompt.experiment.runs import load_run
from fastprompt.files import locked, tensor_bytes, write_file
from fastprompt.learners import Learner
from fastprompt.learners.stored import MODEL
from fastprompt.training.run_folder import STATE, is_run

logger = logging.getLogger(__name__)
POOLED = "logits = logit_scale * normalise(pooled image feature) @ head.T"


def export_run(config: ExportConfig) -> Path:
    """Write the file that ``config`` asks for, and return it; one that holds just that already stays as it is.

    Raises:
        InputError: a file of another kind, a file of a run or one that exists, class names that the run cannot take, a
            learner without such a head, packages that are missing, or another process that writes into the folder.
    """
    out = config.out or config.run / "head.safetensors"
    makers = {".safetensors": head_bytes, ".onnx": onnx_bytes}
    if out.suffix not in makers:
        raise InputError(f"out: expected a file that ends in {' or '.join(makers)}, got {out}")
    # Some file systems take Model.safetensors for model.safetensors.
    if out.name.lower() in (MODEL, STATE) and is_run(out.parent):
        raise InputError(f"out: expected another name than that of a file of the run {out.parent}, got {out.name}")
    learner = load_run(config.run, device=config.device, class_names=config.class_names)
    with locked(out.parent):
        content = makers[out.suffix](learner)
        if not out.exists() or (config.force and out.is_file()):
            write_file(out, content)
        elif not out.is_file() or out.read_bytes() != content:
            raise InputError(f"out: expected a new file, or --force to replace this one, got {out}, which exists")
    return out


@torch.no_grad()
def linear_head(learner: Learner) -> tuple[Tensor, bool]:
    """The matrix (C, D) that classifies pooled features, and whether it is the whole of the learner's prediction.

    It is not where patches count (GalLoP, PLOT): then it holds the mean of the prompts that the pooled feature is
    compared with, in MCM at least, and predicts otherwise than the learner.

    Raises:
        InputError: a learner without such a matrix, such as one whose text depends on the image.
    """
    _check(learner)
    if (head := learner.linear_head()) is None:
        raise InputError(f"{learner.method} compares images with no matrix that could be exported")
    backbone = learner.backbone
    generator = torch.Generator().manual_seed(0)
    features = backbone.encode_images(torch.randn(4, 3, *2 * [backbone.image_size], generator=generator))
    logits = backbone.logit_scale * features.pooled @ head.T
    return head, bool(torch.allclose(learner(features).logits, logits, rtol=0, atol=1e-3 * backbone.logit_scale))


def write_head(learner: Learner, file: Path) -> None:
    """Write ``linear_head`` as safetensors: tensor "head", and all that is needed to use it as metadata."""
    write_file(file, head_bytes(learner))


def head_bytes(learner: Learner) -> bytes:
    """Make the content of the file that ``write_head`` writes."""
    head, whole = linear_head(learner)
    if not whole:
        logger.warning(
            "%s scores patches, which the head leaves out: it predicts otherwise than the run", learner.method
        )
    described = {name: json.dumps(value) for name, value in _described(learner).items()}
    described |= {"formula": POOLED, "whole_prediction": json.dumps(whole)}
    return b"".join(tensor_bytes({"head": head.float()}, described))


def write_onnx(learner: Learner, file: Path) -> None:
    """Write image tower and learner as ONNX: "images" (B, 3, S, S), preprocessed, to "logits" (B, C).

    Raises:
        InputError: a learner whose text depends on the image or whose scores on the batch, or the packages of the extra
            "onnx" are not installed.
    """
    write_file(file, onnx_bytes(learner))


def onnx_bytes(learner: Learner) -> bytes:
    """Make the content of the file that ``write_onnx`` writes; errors as there."""
    _check(learner)
    if not learner.independent_images:
        raise InputError(f"{learner.method} scores an image by a look at its whole batch, which ONNX cannot express")
    try:
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f"export to ONNX needs the package {error.name!r}: pip install 'fastprompt[onnx]'") from error
    size = learner.backbone.image_size
    images = torch.zeros(2, 3, size, size, device=learner.backbone.device, dtype=learner.backbone.dtype)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(_Classifier(learner, images), (images,), dynamic_shapes=({0: batch},))
        program = program.run_decompositions(onnx_decompositions())
        written = torch.onnx.export(
            program, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
        )
    written.model.metadata_props.update({name: json.dumps(value) for name, value in _described(learner).items()})
    return written.model_proto.SerializeToString(deterministic=True)


def _check(learner: Learner) -> None:
    if not learner.fixed_text:
        raise InputError(
            f"{learner.method} runs the text tower for every image and has no fixed text features, which export needs"
        )


class _Classifier(nn.Module):
    """Images to logits, with the text features as constants."""

    def __init__(self, learner: Learner, images: Tensor) -> None:
        super().__init__()
        learner(learner.backbone.encode_images(images))  # fills what is computed once
        self.learner, self.backbone = learner.with_constants(), learner.backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.learner(self.backbone.encode_images(images)).logits


def _described(learner: Learner) -> dict[str, Any]:
    """What a user of the exported file has to know."""
    return {
        "method": learner.method,
        "class_names": list(learner.class_names),
        "backbone": learner.backbone.name,
        "pretrained": learner.backbone.pretrained,
        "logit_scale": learner.backbone.logit_scale,
        "preprocessing": _preprocessing(learner.backbone),
    }


def _preprocessing(backbone: Backbone) -> dict[str, Any]:
    """How an RGB image becomes the tower's input: resized, cropped in the centre, scaled to 0..1, normalised."""
    return {
        "size": backbone.image_size,
        "resize_mode": backbone.resize_mode,
        "interpolation": backbone.interpolation,
        "mean": backbone.mean,
        "std": backbone.std,
    }
