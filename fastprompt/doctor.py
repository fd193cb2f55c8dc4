"""What this machine can run, and why not more."""

from __future__ import annotations

import platform

import open_clip
import torch
from fastprompt_kernels import available_implementations

from fastprompt.data import default_cache_dir
from fastprompt.errors import InputError
from fastprompt.training.environment import environment


def examine(backbone: str | None = None) -> str:
    """A page of plain text: versions, devices, implementations of the kernels, the cache, and one backbone.

    Args:
        backbone: open_clip architecture to describe from its configuration; nothing is loaded.
    """
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    sections = [("environment", {key: value for key, value in environment().items() if value is not None})]
    for device in devices:
        name = platform.processor() if device == "cpu" else torch.cuda.get_device_name(device)
        usable = available_implementations(device)
        auto = "triton" if usable["triton"] == "usable" else "blocked"
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
    config = open_clip.get_model_config(name)
    if config is None:
        raise InputError(f"backbone {name!r} is not an architecture of open_clip: open_clip.list_models() lists them")
    text = config["text_cfg"]
    if "hf_model_name" in text:
        prompts = "not supported: the text tower is a Hugging Face model"
    elif text.get("no_causal_mask"):
        prompts = "at full length: the text tower is not causal, so prefixes cannot be shared"
    else:
        prompts = "by shared prefix and packed names (exact: the text tower is causal)"
    return {
        "prompts are encoded": prompts,
        "context length": text.get("context_length", 77),
        "activation": "QuickGELU" if config.get("quick_gelu") else "GELU",
        "pretrained tags": ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none",
    }
