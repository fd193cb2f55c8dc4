"""From a checkpoint of other code to a run folder of ours."""

from __future__ import annotations

import re
from typing import Any

from fastprompt.backbone import Backbone, load_backbone
from fastprompt.data import load_dataset, readable_name, select_classes
from fastprompt.documents import read_text, short
from fastprompt.errors import InputError
from fastprompt.exchange.checkpoint import Checkpoint, read_checkpoint
from fastprompt.exchange.class_rows import SAME_EMBEDDING, read_class_rows
from fastprompt.exchange.config import ImportConfig
from fastprompt.exchange.words import token_embeddings
from fastprompt.experiment.identity import file_identity
from fastprompt.learners import Learner, make_learner
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
    keep = checkpoint.method == "gallop" if config.keep_underscores is None else config.keep_underscores
    class_names = _class_names(config, keep)
    name, weights = config.backbone_and_weights()
    if backbone is None:
        place = {"device": config.device, "precision": config.precision, "cache_dir": config.weights_dir}
        backbone = load_backbone(name, weights, patches=config.patch_features, **place)
    _check_backbone(checkpoint, backbone)
    checkpoint = read_class_rows(checkpoint, backbone, class_names)
    learner = _learner(checkpoint, backbone, class_names, config)
    described = {
        "method": learner.method,
        "imported_from": config.file.resolve(),
        "checkpoint": file_identity(config.file, "checkpoint"),
        "backbone": name,
        "pretrained": weights,
        "weights": backbone.fingerprint,
        "precision": config.precision,
        "patch_features": config.patch_features,
        "data": None if config.data is None else config.data.resolve(),
        "split_file": None if config.split_file is None else config.split_file.resolve(),
        "keep_underscores": keep,
        "classes": config.classes,
        "zero_shot_template": DEFAULT_TEMPLATE,
        "options": learner.options,
        "class_names": class_names,
    }
    run = RunFolder.create_or_resume(config.out, described)
    with run.locked():
        if not run.complete:
            run.save_model(learner, config.weights_dir)
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
    embedded = next(iter(checkpoint.learned.values())), checkpoint.start_of_text, checkpoint.suffix
    widths = [tensor.shape[-1] for tensor in embedded if tensor is not None]
    if wrong := [width for width in widths if width != backbone.text_width]:
        raise InputError(f"{other}: its tokens are {wrong[0]} wide, and those of the text tower {backbone.text_width}")
    if checkpoint.start_of_text is not None:
        start = token_embeddings(backbone)[backbone.tokenizer.start_of_text].cpu()
        if (start - checkpoint.start_of_text).abs().max() > SAME_EMBEDDING * start.abs().max():
            raise InputError(f"{other}: its embedding of the start of text is a different one")
    projection = checkpoint.learned.get("local_projection")
    if projection is not None and len(projection) != backbone.patch_width:
        raise InputError(f"{other}: its projection takes {len(projection)} numbers, a patch has {backbone.patch_width}")
    named = str(checkpoint.arguments.get("clip_name", ""))  # such as clip_vit_b16
    theirs, ours = re.fullmatch(r"clip_vit_b(\d+)", named), re.search(r"ViT-B-(\d+)", backbone.name)
    if theirs and ours and theirs[1] != ours[1]:
        raise InputError(f"{other}: its training script was run with {named}")


def _learner(checkpoint: Checkpoint, backbone: Backbone, class_names: tuple[str, ...], config: ImportConfig) -> Learner:
    """Our learner with the checkpoint's tensors."""
    learned, options = checkpoint.learned, _options(checkpoint, config)
    own = learned["context"].dim() == 3 if "context" in learned else False
    if own and len(learned["context"]) != len(class_names):
        classes = len(learned["context"])
        raise InputError(f"{checkpoint.file} has contexts of {classes} classes, but {len(class_names)} are named")
    learner = make_learner(checkpoint.method, backbone, class_names, **options)
    restore_learned(learner, learned, checkpoint.file)
    return learner


def _options(checkpoint: Checkpoint, config: ImportConfig) -> dict[str, Any]:
    """What our learner is made from, as far as tensors and arguments of the training tell."""
    learned = checkpoint.learned
    if checkpoint.method == "plot":
        prompts, tokens, _ = learned["contexts"].shape
        return {"prompts": prompts, "context": tokens}
    if checkpoint.method != "gallop":
        own = {"class_specific": learned["context"].dim() == 3, "position": config.position}
        return {"context": learned["context"].shape[-2]} | (own if checkpoint.method == "coop" else {})
    prompts, (local, tokens, _) = learned["global_prompts"], learned["local_prompts"].shape
    given = {"topk": [5, 10, 15, 20], "global_dropout_p": 0.75} | dict(checkpoint.arguments)
    k, dropout = given["topk"], given["global_dropout_p"]
    if not isinstance(k, list | tuple) or not all(isinstance(one, int) for one in k):
        raise InputError(f"{checkpoint.file}: its training script must have had whole numbers as topk, not {short(k)}")
    if not isinstance(dropout, int | float):
        raise InputError(f"{checkpoint.file}: its training script must have had a share to drop, not {short(dropout)}")
    k = list(k) * local if len(k) == 1 else list(k)
    if len(k) != local:
        raise InputError(f"{checkpoint.file} has {local} local prompts, but its training script was given topk = {k}")
    return {"global_prompts": len(prompts), "k": k, "dropout": dropout, "context": tokens}
