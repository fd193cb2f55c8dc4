"""From a checkpoint of other code to a run folder of ours."""

from __future__ import annotations

import re

from fastprompt.backbone import Backbone
from fastprompt.data import load_dataset, readable_name, select_classes
from fastprompt.documents import absolute_path, read_text
from fastprompt.errors import InputError
from fastprompt.exchange.checkpoint import ROWS, Checkpoint, read_checkpoint
from fastprompt.exchange.class_rows import SAME_EMBEDDING, read_class_rows
from fastprompt.exchange.config import ImportConfig
from fastprompt.exchange.words import token_embeddings
from fastprompt.experiment.identity import file_identity
from fastprompt.experiment.sources import open_backbone
from fastprompt.learners import make_learner
from fastprompt.learners.stored import restore_learned
from fastprompt.learners.templates import DEFAULT_TEMPLATE
from fastprompt.training import RunFolder


def import_run(config: ImportConfig, *, backbone: Backbone | None = None) -> RunFolder:
    """Read a checkpoint and write it as a finished run, which evaluate, predict, explain and export take.

    A run that holds the same already stays as it is; any other one is refused.

    Args:
        config: what to read, and where its class names are.
        backbone: the one that ``config`` names, if it is loaded already.

    Raises:
        InputError: an unreadable checkpoint, one of another backbone or other classes, as far as it tells, or a folder
            that is in use.
    """
    checkpoint = read_checkpoint(config.file)
    keep = checkpoint.learner.keeps_underscores if config.keep_underscores is None else config.keep_underscores
    class_names = _class_names(config, keep)
    backbone = backbone or open_backbone(config.backbone, config.place)
    _check_backbone(checkpoint, backbone)
    checkpoint = read_class_rows(checkpoint, backbone, class_names)
    options = checkpoint.options()
    if "position" in checkpoint.learner.option_parameters():
        options["position"] = config.position  # which no checkpoint says
    learner = make_learner(checkpoint.learner.method, backbone, class_names, **options)
    restore_learned(learner, checkpoint.learned, checkpoint.file)
    described = {
        "method": learner.method,
        "imported_from": absolute_path(config.file),
        "checkpoint": file_identity(config.file, "checkpoint"),
        **config.backbone.absolute(),
        "weights": backbone.fingerprint,
        "data": None if config.data is None else absolute_path(config.data),
        "split_file": None if config.split_file is None else absolute_path(config.split_file),
        "keep_underscores": keep,
        "classes": config.classes,
        "zero_shot_template": DEFAULT_TEMPLATE,
        "options": learner.options,
        "class_names": class_names,
    }
    run = RunFolder.create_or_resume(config.out, described)
    with run.locked():
        if not run.complete:
            run.save_model(learner, config.place.weights_dir)
    return run


def _class_names(config: ImportConfig, keep_underscores: bool) -> tuple[str, ...]:
    if (config.data is None) == (config.class_names is None):
        raise InputError("class names: expected either --data or --class-names, as the checkpoint does not name them")
    if config.class_names is not None:
        file = config.class_names
        return tuple(
            readable_name(line, keep_underscores, f"class names {file}, line {number}")
            for number, line in enumerate(read_text(file, "class names").splitlines(), 1)
            if line.strip()
        )
    dataset = load_dataset(config.data, split_file=config.split_file, keep_underscores=keep_underscores)
    return select_classes(dataset.train, config.classes).class_names


def _check_backbone(checkpoint: Checkpoint, backbone: Backbone) -> None:
    """Raise ``InputError`` where the checkpoint was trained on another backbone, as far as it tells."""
    other = f"{checkpoint.file} was trained on another backbone than {backbone.name!r}"
    read = [checkpoint.learned[name] for name in checkpoint.learner.contexts_named]
    widths = [
        tensor.shape[-1] for tensor in (*read, *(checkpoint.state[name] for name in ROWS if name in checkpoint.state))
    ]
    if wrong := [width for width in widths if width != backbone.text_width]:
        raise InputError(f"{other}: its tokens are {wrong[0]} wide, and those of the text tower {backbone.text_width}")
    if ROWS[0] in checkpoint.state:
        start = token_embeddings(backbone)[backbone.tokenizer.start_of_text].cpu()
        if (start - checkpoint.state[ROWS[0]][0, 0]).abs().max() > SAME_EMBEDDING * start.abs().max():
            raise InputError(f"{other}: its embedding of the start of text is a different one")
    named = str(checkpoint.arguments.get("clip_name", ""))  # such as clip_vit_b16
    theirs, ours = re.fullmatch(r"clip_vit_b(\d+)", named), re.search(r"ViT-B-(\d+)", backbone.name)
    if theirs and ours and theirs[1] != ours[1]:
        raise InputError(f"{other}: its training script was run with {named}")
