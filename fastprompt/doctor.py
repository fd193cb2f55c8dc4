"""What this machine can run, and why not more."""

from __future__ import annotations

import platform

import open_clip
import torch
from fastprompt_kernels import available_implementations

from fastprompt.backbone.image_towers import image_tower
from fastprompt.backbone.text_model import TextModel
from fastprompt.data import default_cache_dir
from fastprompt.errors import InputError
from fastprompt.training.environment import environment


def examine(backbone: str | None = None) -> str:
    """A page of plain text: versions, devices, implementations of the kernels, the cache, and one backbone.

    Args:
        backbone: open_clip architecture to describe; nothing is downloaded.
    """
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    sections = [("environment", {key: value for key, value in environment().items() if value is not None})]
    for device in devices:
        name = platform.processor() if device == "cpu" else torch.cuda.get_device_name(device)
        usable = available_implementations(device)
        in_torch = "blocked, or dense where it is small" if device == "cpu" else "dense"
        auto = "triton" if usable["triton"] == "usable" else in_torch
        kernels = {f"topk_similarity impl={impl!r}": reason for impl, reason in usable.items()}
        sections.append((f"{device} {name}".strip(), {**kernels, "topk_similarity impl='auto' picks": auto}))
    sections.append(("feature cache", _cache_facts()))
    if backbone is not None:
        sections.append((f"backbone {backbone}", _backbone_facts(backbone)))
    return "\n\n".join(_section(title, facts) for title, facts in sections)


def _section(title: str, facts: dict[str, object]) -> str:
    width = max(map(len, facts))
    return "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in facts.items())])


def _cache_facts() -> dict[str, object]:
    folder = default_cache_dir()
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) if folder.is_dir() else 0
    return {"folder": folder, "size": f"{size / 1e6:.1f} MB"}


def _backbone_facts(name: str) -> dict[str, object]:
    """What the towers of an architecture say of themselves, built without memory for their weights."""
    if name not in open_clip.list_models():
        raise InputError(f"backbone {name!r} is not an architecture of open_clip: open_clip.list_models() lists them")
    config = open_clip.get_model_config(name)
    try:
        with torch.device("meta"):
            model = open_clip.create_model(name, device="meta", load_weights=False, pretrained_text=False)
            images = image_tower(model.visual, _side(open_clip.get_model_preprocess_cfg(model)["size"]))
            text = TextModel.read(model)
    except (InputError, RuntimeError) as error:
        return {"not supported": error}
    shared = "by shared prefix and packed names (exact: the text tower is causal)"
    full = "at full length: the text tower is not causal, so prefixes cannot be shared"
    return {
        "prompts are encoded": shared if text.causal else full,
        "context length": text.context_length,
        "patches": "{} x {}, {} wide".format(*images.patch_grid, images.patch_width),
        "activation": "QuickGELU" if config.get("quick_gelu") else "GELU",
        "pretrained tags": ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none",
    }


def _side(size: int | tuple[int, int]) -> int:
    return size if isinstance(size, int) else size[0]
