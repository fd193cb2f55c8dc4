"""Loading a backbone by name, with the errors that a newcomer needs."""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg
from open_clip.tokenizer import SimpleTokenizer
from safetensors import SafetensorError
from torch import nn

from fastprompt.backbone.backbone import Backbone
from fastprompt.backbone.memory import MemoryBudget
from fastprompt.backbone.tokenizer import load_tokenizer, read_tokenizer
from fastprompt.errors import InputError

PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANDOM = "random"
DEMO = "demo"


def load_backbone(
    name: str,
    pretrained: str | None = None,
    *,
    device: str | torch.device | None = None,
    precision: str | None = None,
    cache_dir: str | Path | None = None,
    memory_budget: MemoryBudget = "auto",
    cuda_graphs: bool = True,
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
        cache_dir: where downloaded weights are kept; open_clip's own default otherwise.
        memory_budget: bytes that encoding prompts may take, or "auto"; see ``Backbone``.
        cuda_graphs: whether a GPU replays passes through the text tower that repeat; see ``Backbone``.

    Raises:
        InputError: unknown name, tag, device or precision; an activation that does not fit the weights; a tower that
            cannot be read.
    """
    device = _device(device)
    if precision not in (None, *PRECISIONS):
        raise InputError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if name == DEMO:
        from fastprompt.backbone.demo_model import load_demo_clip  # its weights are read only when asked for

        model, config = load_demo_clip()
        tokenizer = read_tokenizer(SimpleTokenizer())
    else:
        model, config = _load_open_clip(name, pretrained, cache_dir)
        tokenizer = load_tokenizer(name)
    fingerprint = _fingerprint(model, config)  # before the precision is lowered, so that it names the weights alone
    return Backbone(
        model.to(device, PRECISIONS[precision or "fp32"]),
        tokenizer,
        name=name,
        pretrained=pretrained,
        fingerprint=fingerprint,
        preprocessing=open_clip.get_model_preprocess_cfg(model),
        memory_budget=memory_budget,
        cuda_graphs=cuda_graphs,
    )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device: expected a device of this machine such as 'cpu', got {device!r}: {reason}"
        ) from error
    return device


def _load_open_clip(name: str, pretrained: str | None, cache_dir: str | Path | None) -> tuple[nn.Module, dict]:
    """The open_clip model in float32 on the CPU, and its configuration."""
    if not name.startswith(("hf-hub:", "local-dir:")):
        _check_name(name, pretrained)
    try:
        model = open_clip.create_model(
            name, None if pretrained == RANDOM else pretrained, cache_dir=None if cache_dir is None else str(cache_dir)
        )
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise InputError(f"backbone {name!r} with weights {pretrained!r} could not be loaded: {error}") from error
    return model, open_clip.get_model_config(name) or {"name": name}


def _check_name(name: str, pretrained: str | None) -> None:
    """Refuse unknown names and tags, missing weights, and the wrong activation."""
    known = open_clip.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "open_clip.list_models() lists them"
        raise InputError(f"backbone {name!r} is not an architecture of open_clip: {hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise InputError(f"backbone {name!r} needs weights: pass pretrained as a file or one of {', '.join(tags)}")
    tag = get_pretrained_cfg(name, pretrained)
    if pretrained != RANDOM and not tag and not Path(pretrained).is_file():
        raise InputError(f"pretrained: {pretrained!r} is neither a file nor a tag of {name!r} ({', '.join(tags)})")
    if Path(pretrained).is_file() and not pretrained.endswith(".safetensors"):
        raise InputError(f"pretrained: expected a .safetensors file, got {pretrained!r}: other files are not unpickled")
    wants_quick_gelu = bool(tag.get("quick_gelu", False))
    if tag and wants_quick_gelu != bool(open_clip.get_model_config(name).get("quick_gelu", False)):
        other = f"{name}-quickgelu" if wants_quick_gelu else name.removesuffix("-quickgelu")
        trained = "QuickGELU" if wants_quick_gelu else "the exact GELU"
        raise InputError(
            f"weights {pretrained!r} were trained with {trained}, which {name!r} does not have: pass {other!r} instead"
        )


def _fingerprint(model: nn.Module, config: dict) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
