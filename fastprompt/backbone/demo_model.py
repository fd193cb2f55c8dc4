"""The small CLIP that comes with the package: trained by `fastprompt.demo.pretrain` on rendered scenes.

`demo/model.safetensors` holds the weights in half precision. Of the token embedding it holds the rows of those tokens
that pretraining captions use (`token_rows` are their ids, `token_embedding` their values). The other rows were never
trained and are zero, so a word outside that vocabulary means nothing. `demo/pretraining.json` tells how it was trained.
"""

import json
from pathlib import Path

import torch
from open_clip.model import CLIP, set_model_preprocess_cfg
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).parent / "demo"
MEAN: tuple[float, float, float] = (0.5, 0.5, 0.5)
STD: tuple[float, float, float] = (0.25, 0.25, 0.25)
INTERPOLATION = "bicubic"


def load_demo_clip(folder: Path = FOLDER) -> tuple[CLIP, dict]:
    """Builds the demo's CLIP with its trained weights (float32, evaluation mode); also returns its configuration."""
    document = json.loads((folder / "open_clip_config.json").read_text())
    config = document["model_cfg"]
    model = CLIP(**config)
    set_model_preprocess_cfg(model, document["preprocess_cfg"])
    tensors = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    rows = tensors.pop("token_rows").long()
    embedding = torch.zeros_like(model.token_embedding.weight)
    embedding[rows] = tensors.pop("token_embedding")
    model.load_state_dict(tensors | {"token_embedding.weight": embedding})
    return model.eval(), config


def load_pretraining_facts(folder: Path = FOLDER) -> dict[str, float | int | str]:
    """How the demo's CLIP was trained: settings, images seen, seconds, zero-shot accuracy."""
    return json.loads((folder / "pretraining.json").read_text())


def save_demo_clip(folder: Path, config: dict, state: dict[str, Tensor], rows: Tensor, facts: dict) -> None:
    """Writes what `load_demo_clip` and `load_pretraining_facts` read.

    Args:
        folder: Where to write; made if absent.
        config: Arguments of `open_clip.CLIP`.
        state: The model's state, but "token_embedding.weight" (len(rows), W) has the trained rows only.
        rows: (len(rows),) token ids of those rows.
        facts: How the model was trained; plain JSON values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.half().contiguous() for name, value in state.items()}
    tensors["token_embedding"] = tensors.pop("token_embedding.weight")
    save_file(tensors | {"token_rows": rows.int()}, folder / "model.safetensors")
    preprocess = {
        "size": config["vision_cfg"]["image_size"],
        "mean": MEAN,
        "std": STD,
        "interpolation": INTERPOLATION,
        "resize_mode": "shortest",
        "mode": "RGB",
    }
    document = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(document, indent=2) + "\n")
    (folder / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n")
