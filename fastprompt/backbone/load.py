"""Loading a backbone by name, with the errors that a newcomer needs."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.pretrained import get_pretrained_cfg
from open_clip.tokenizer import SimpleTokenizer
from torch import nn

from fastprompt.backbone.backbone import Backbone
from fastprompt.backbone.image_towers import Patches
from fastprompt.backbone.memory import MemoryBudget
from fastprompt.backbone.tokenizer import load_tokenizer, read_tokenizer
from fastprompt.documents import check_file, check_number, check_object, check_type, read_json, short
from fastprompt.errors import InputError, listed

PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANDOM = "random"
DEMO = "demo"
LOCAL = "local-dir:"
HUB = "hf-hub:"
REACHED = 5.0  # seconds within which a hub must answer


def load_backbone(
    name: str,
    pretrained: str | None = None,
    *,
    device: str | torch.device | None = None,
    precision: str | None = None,
    patches: Patches = "value",
    cache_dir: str | Path | None = None,
    memory_budget: MemoryBudget = "auto",
    cuda_graphs: bool = False,
) -> Backbone:
    """Load a frozen CLIP model.

    Args:
        name: an open_clip architecture ("ViT-B-16-quickgelu"), "hf-hub:org/model", "local-dir:folder" with an
            ``open_clip_config.json`` and weights, or "demo", the small model that comes with this package.
        pretrained: an open_clip tag ("openai"; downloaded once), a .safetensors file, or "random" for random weights.
            Not used with "hf-hub:", "local-dir:" and "demo".
        device: where the model runs; CUDA if there is one, else the CPU.
        precision: "fp64", "fp32", "bf16" or "fp16" for the frozen weights; fp32 by default. Learned tensors are
            float32 whatever this is.
        patches: "value" for the patch features of the value path, or "published" for those of PLOT's code, which its
            attention pooling makes; CLIP's ResNets alone have them. The fingerprint tells the two apart.
        cache_dir: where downloaded weights are kept; open_clip's own default otherwise.
        memory_budget: bytes that encoding prompts may take, or "auto"; see ``Backbone``.
        cuda_graphs: whether a GPU replays passes through the text tower; see ``Backbone``.

    Raises:
        InputError: unknown name, tag, device, precision or patches; an activation that does not fit the weights; a
            tower that cannot be read, or has no such patches; weights that are not here, and their hub cannot be
            reached.
    """
    device = find_device(device)
    if precision not in (None, *PRECISIONS):
        raise InputError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if patches not in get_args(Patches):
        raise InputError(f"patches: expected {' or '.join(get_args(Patches))}, got {short(patches)}")
    if name == DEMO:
        from fastprompt.backbone.demo_model import load_demo_clip  # its weights are read only when asked for

        model, config = load_demo_clip()
        tokenizer = read_tokenizer(SimpleTokenizer())
    else:
        model, config = _load_open_clip(name, pretrained, cache_dir)
        tokenizer = load_tokenizer(name)
    fingerprint = _fingerprint(model, config, name)  # of float32, so that it names the weights alone
    return Backbone(
        model.to(device, PRECISIONS[precision or "fp32"]),
        tokenizer,
        name=name,
        pretrained=pretrained,
        fingerprint=fingerprint,
        preprocessing=_preprocessing(model, name),
        patches=patches,
        memory_budget=memory_budget,
        cuda_graphs=cuda_graphs,
    )


def find_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, or by default CUDA if there is one, else the CPU.

    Raises:
        InputError: this machine has no such device, or it holds no numbers (meta).
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = 0 if accelerator is None else torch.accelerator.device_count()
    known = ["cpu", *([] if accelerator is None else [accelerator.type])]
    known += [f"{accelerator.type}:{index}" for index in range(count)]
    if str(device) not in known:
        raise InputError(f"device: expected {' or '.join(known)}, got {short(str(device))}")
    return torch.device(device)


def _load_open_clip(name: str, pretrained: str | None, cache_dir: str | Path | None) -> tuple[nn.Module, dict]:
    """The open_clip model in float32 on the CPU, and its configuration."""
    if name.startswith(LOCAL):
        _check_folder(Path(name.removeprefix(LOCAL)))
    elif not name.startswith(HUB):
        _check_name(name, pretrained)
    _check_reachable(name, pretrained, cache_dir)
    try:
        model = open_clip.create_model(
            name,
            None if pretrained == RANDOM else pretrained,
            cache_dir=None if cache_dir is None else str(cache_dir),
            require_pretrained=name.startswith((LOCAL, HUB)),  # it would start from random weights without a word
        )
        return model, open_clip.get_model_config(name) or {"name": name}
    except Exception as error:  # over a configuration of another shape open_clip stumbles in many ways
        raise InputError(
            f"backbone {name!r} with weights {pretrained!r} could not be loaded ({type(error).__name__}: {error})"
        ) from error


def _check_folder(folder: Path) -> None:
    """Raise ``InputError`` unless a folder has a configuration and weights that can be read."""
    if not folder.is_dir():
        raise InputError(f"backbone folder {folder}: no such folder")
    config = folder / "open_clip_config.json"
    check_object(read_json(config, "backbone"), f"backbone {config}", ["model_cfg"])
    weights = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pth")]
    if not weights:
        raise InputError(f"backbone folder {folder}: expected weights as a .safetensors file in it, got none")
    for file in weights:
        check_file(file, "backbone")


def _check_name(name: str, pretrained: str | None) -> None:
    """Refuse unknown names and tags, missing weights, and the wrong activation."""
    known = open_clip.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "open_clip.list_models() lists them"
        raise InputError(f"backbone {name!r} is not an architecture of open_clip: {hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise InputError(f"backbone {name!r} needs weights: pass pretrained as a file or one of {listed(tags)}")
    tag = get_pretrained_cfg(name, pretrained)
    if pretrained != RANDOM and not tag and not Path(pretrained).is_file():
        raise InputError(f"pretrained: {pretrained!r} is neither a file nor a tag of {name!r} ({listed(tags)})")
    if Path(pretrained).is_file() and not pretrained.endswith(".safetensors"):
        raise InputError(f"pretrained: expected a .safetensors file, got {pretrained!r}: other files are not unpickled")
    wants_quick_gelu = bool(tag.get("quick_gelu", False))
    if tag and wants_quick_gelu != bool(open_clip.get_model_config(name).get("quick_gelu", False)):
        other = f"{name}-quickgelu" if wants_quick_gelu else name.removesuffix("-quickgelu")
        trained = "QuickGELU" if wants_quick_gelu else "the exact GELU"
        raise InputError(
            f"weights {pretrained!r} were trained with {trained}, which {name!r} does not have: pass {other!r} instead"
        )


def _check_reachable(name: str, pretrained: str | None, cache_dir: str | Path | None) -> None:
    """Raise ``InputError`` if weights have to be downloaded and their hub does not answer.

    A download would try again for a minute. Any answer will do here: what is wrong with it, the download says better.
    """
    if name.startswith(HUB):
        repository, _, revision = name.removeprefix(HUB).partition("@")
        file = ""
    else:
        tag = get_pretrained_cfg(name, pretrained) if pretrained else {}
        repository, _, file = tag.get("hf_hub", "").rpartition("/")
        revision = ""
    if not repository:
        return
    file = file or HF_WEIGHTS_NAME
    safe = HF_SAFE_WEIGHTS_NAME if file == HF_WEIGHTS_NAME else str(Path(file).with_suffix(".safetensors"))
    for known in (safe, file):
        kept = huggingface_hub.try_to_load_from_cache(repository, known, cache_dir, revision or None)
        if isinstance(kept, str):
            return
    url = huggingface_hub.hf_hub_url(repository, safe, revision=revision or None)
    try:
        huggingface_hub.get_session().head(url, timeout=REACHED)
    except Exception as error:  # of requests or of httpx, as the version of huggingface_hub has it
        server = "/".join(url.split("/")[:3])
        raise InputError(
            f"weights of {repository!r}: expected {server} to answer, got {type(error).__name__}; without a network "
            "pass --pretrained FILE.safetensors, or --weights-dir FOLDER that they were downloaded to"
        ) from error


def _preprocessing(model: nn.Module, name: str) -> dict[str, Any]:
    """How pictures become its images, as its configuration has it."""
    found = open_clip.get_model_preprocess_cfg(model)
    hints = {"mean": Sequence[float], "std": Sequence[float], "interpolation": str, "resize_mode": str}
    for key, hint in hints.items():
        check_type(found.get(key), hint, f"backbone {name!r}: {key}")
        check_number(found[key], f"backbone {name!r}: {key}")
    return found


def _fingerprint(model: nn.Module, config: dict, name: str) -> str:
    """A hash of weights and configuration; ``InputError`` where a weight is no number."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for key, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().float().contiguous()
        if not values.isfinite().all():
            raise InputError(f"backbone {name!r}: expected finite weights, got NaN or infinity in {key}")
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
