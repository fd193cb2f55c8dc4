"""A learner as tensors and a description, and back; and its way to the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
from huggingface_hub import ModelHubMixin, hf_hub_download
from torch import Tensor, nn

from fastprompt.backbone import Backbone, load_backbone
from fastprompt.errors import InputError
from fastprompt.files import write_file, write_tensors

if TYPE_CHECKING:
    from fastprompt.learners.base import Learner

MODEL, METADATA = "model.safetensors", "fastprompt"


def describe(learner: Learner) -> dict[str, Any]:
    """What a learner is made from, beside its learned tensors and its options: what JSON can hold."""
    return {
        "method": learner.method,
        "class_names": list(learner.class_names),
        "backbone": learner.backbone.name,
        "pretrained": learner.backbone.pretrained,
        "fingerprint": learner.backbone.fingerprint,
    }


def rebuild(described: Mapping[str, Any], learned: Mapping[str, Tensor], backbone: Backbone, file: Path) -> Learner:
    """The learner that ``describe`` described, with its learned tensors, in evaluation mode.

    Args:
        described: by ``describe``, and the learner's options under "options".
        learned: its tensors.
        backbone: the one that it was trained on.
        file: where all this comes from, for messages.

    Raises:
        InputError: the backbone has other weights, or the tensors are not those of the learner.
    """
    from fastprompt.learners import make_learner  # which imports this module

    if backbone.fingerprint != described["fingerprint"]:
        raise InputError(
            f"{file} was trained on weights of {backbone.name!r} with fingerprint {described['fingerprint']}, "
            f"but those found now have {backbone.fingerprint}"
        )
    learner = make_learner(described["method"], backbone, described["class_names"], **described["options"])
    restore_learned(learner, learned, file)
    return learner.eval()


def restore_learned(learner: nn.Module, learned: Mapping[str, Tensor], path: Path) -> None:
    """Copy learned tensors from a file into a learner.

    Raises:
        InputError: The names or shapes in the file are not those of the learner.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in learner.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in learned.items()}
    if expected != found:
        raise InputError(f"{path} must hold the learned tensors {expected} of this learner, but it holds {found}")
    learner.load_state_dict(dict(learned))


class HubLearner(ModelHubMixin, library_name="fastprompt", tags=["prompt-learning", "clip"]):
    """``save_pretrained``, ``push_to_hub`` and ``from_pretrained`` of every learner, by huggingface_hub.

    What is stored are the learned tensors and a description; the backbone is loaded by its name.
    ``from_pretrained`` takes ``backbone``, if it is loaded already, or ``device`` and ``precision`` to load it with.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        described = {METADATA: {**describe(self), "options": self.options}}
        write_tensors(save_directory / MODEL, self.state_dict(), {METADATA: json.dumps(described[METADATA])})
        write_file(save_directory / "config.json", json.dumps(described, indent=2) + "\n")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        backbone: Backbone | None = None,
        device: str | None = None,
        precision: str | None = None,
        **where: Any,
    ) -> Learner:
        file = Path(model_id) / MODEL
        if not Path(model_id).is_dir():
            file = Path(hf_hub_download(model_id, MODEL, **where))
        try:
            with safetensors.safe_open(file, framework="pt") as stored:
                described = json.loads(stored.metadata()[METADATA])
                learned = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file} must be a learner that save_pretrained wrote: {error}") from error
        own = getattr(cls, "method", described["method"])  # Learner itself has no method, and loads any
        if described["method"] != own:
            raise InputError(f"{file} holds a learner of {described['method']}, not of {own}")
        if backbone is None:
            backbone = load_backbone(described["backbone"], described["pretrained"], device=device, precision=precision)
        return rebuild(described, learned, backbone, file)
