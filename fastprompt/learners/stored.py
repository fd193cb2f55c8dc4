"""A learner as tensors and a description, and back; and its way to the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from torch import Tensor, nn

from fastprompt.backbone import Backbone, load_backbone
from fastprompt.backbone.image_towers import Patches
from fastprompt.documents import build, parse_json
from fastprompt.errors import InputError, listed
from fastprompt.files import read_tensors, write_file, write_tensors
from fastprompt.learners.card import card_text

if TYPE_CHECKING:
    from fastprompt.learners.base import Learner

MODEL = "model.safetensors"
METADATA = "fastprompt"  # safetensors keeps strings only: ours is one JSON object under this key


def describe(learner: Learner) -> dict[str, Any]:
    """Tell what a learner is made from, beside its learned tensors: what JSON can hold."""
    return {
        "method": learner.method,
        "class_names": list(learner.class_names),
        "backbone": learner.backbone.name,
        "pretrained": learner.backbone.pretrained,
        "patches": learner.backbone.patches,
        "fingerprint": learner.backbone.fingerprint,
        "options": learner.options,
    }


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a model file says of its learner; see ``describe``.

    Attributes:
        method: name of the method.
        class_names: the classes.
        backbone: name of the backbone.
        pretrained: its weights, as ``load_backbone`` takes them.
        fingerprint: of the backbone.
        patches: which patch features the backbone gives.
        options: from which the learner was made.
        weights_dir: where the backbone's weights were downloaded to, if not to open_clip's own folder.
    """

    method: str
    class_names: list[str]
    backbone: str
    pretrained: str | None
    fingerprint: str
    options: dict[str, Any]
    patches: Patches = "value"
    weights_dir: str | None = None


def write_learner(file: Path, learner: Learner, **more: Any) -> None:
    """Write learned tensors as safetensors, with ``describe`` and ``more`` of ``Description`` as JSON beside them."""
    write_tensors(file, learner.state_dict(), {METADATA: json.dumps({**describe(learner), **more})})


def read_learner(file: Path) -> tuple[dict[str, Tensor], Description]:
    """Read what ``write_learner`` wrote: the learned tensors on the CPU, and the description.

    Raises:
        InputError: the file is not there, damaged, or holds something else.
    """
    learned, metadata = read_tensors(file, "model")
    return learned, read_description(parse_json(metadata.get(METADATA, "null"), f"model {file}"), file)


def read_description(values: Any, file: Path) -> Description:
    """The description in a model file, from its parsed JSON.

    Raises:
        InputError: a value is missing, unknown or of another type.
    """
    return build(Description, values, f"model {file}")


def rebuild(described: Description, learned: Mapping[str, Tensor], backbone: Backbone, file: Path) -> Learner:
    """The learner that ``describe`` described, with its learned tensors, in evaluation mode.

    Args:
        described: by its model file.
        learned: its tensors.
        backbone: the one that it was trained on.
        file: where all this comes from, for messages.

    Raises:
        InputError: the backbone has other weights, or the tensors are not those of the learner.
    """
    from fastprompt.learners import make_learner  # which imports this module

    if backbone.fingerprint != described.fingerprint:
        raise InputError(
            f"{file} was trained on weights of {backbone.name!r} with fingerprint {described.fingerprint}, "
            f"but those found now have {backbone.fingerprint}"
        )
    learner = make_learner(described.method, backbone, described.class_names, **described.options)
    restore_learned(learner, learned, file)
    return learner.eval()


def restore_learned(learner: nn.Module, learned: Mapping[str, Tensor], path: Path) -> None:
    """Copy learned tensors from a file into a learner.

    Raises:
        InputError: The names or shapes in the file are not those of the learner, or a number is NaN or infinite.
    """
    expected, found = _shapes(learner.state_dict()), _shapes(learned)
    if expected != found:
        raise InputError(
            f"{path}: expected the learned tensors {listed(expected - found)}, got {listed(found - expected)}"
        )
    check_finite(learned, path)
    learner.load_state_dict(dict(learned))


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ``InputError`` where a tensor does not hold real numbers, or one of them is NaN or infinite."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{path}: expected floating-point numbers in {name}, got {tensor.dtype}")
        if not tensor.float().isfinite().all():
            raise InputError(f"{path}: expected finite numbers in {name}, got NaN or infinity")


def _shapes(tensors: Mapping[str, Tensor]) -> set[str]:
    return {f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()}


class HubLearner(ModelHubMixin, library_name="fastprompt", tags=["prompt-learning", "clip"]):
    """``save_pretrained``, ``push_to_hub`` and ``from_pretrained`` of every learner, by huggingface_hub.

    What is stored are the learned tensors, a description and a card (README.md), which ``model_card_kwargs`` tells of
    training settings and accuracy. The backbone is loaded by its name.
    ``from_pretrained`` takes ``backbone``, if it is loaded already, or ``device`` and ``precision`` to load it with.
    """

    def generate_model_card(
        self, *, repo_id: str = "name/repository", settings: object = None, accuracy: float | None = None
    ) -> ModelCard:
        """Make the card: method, backbone, class names, how to load it, and what ``model_card_kwargs`` brings.

        Args:
            repo_id: where it will be loaded from.
            settings: how it was trained, such as ``TrainingSettings``.
            accuracy: share of test images that it named right.
        """
        text = card_text(self, describe(self), repository=repo_id, training=settings, accuracy=accuracy)
        return ModelCard(text)

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **where: Any) -> str:
        """Put the learner into a repository of the Hub; see ``huggingface_hub.ModelHubMixin``. Returns its address."""
        facts = {"repo_id": repo_id, **(model_card_kwargs or {})}
        return super().push_to_hub(repo_id, model_card_kwargs=facts, **where)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_learner(save_directory / MODEL, self)
        write_file(save_directory / "config.json", json.dumps({METADATA: describe(self)}, indent=2) + "\n")

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
        learned, described = read_learner(file)
        own = getattr(cls, "method", described.method)  # Learner itself has no method, and loads any
        if described.method != own:
            raise InputError(f"{file} holds a learner of {described.method}, not of {own}")
        if backbone is None:
            place = {"device": device, "precision": precision, "patches": described.patches}
            backbone = load_backbone(described.backbone, described.pretrained, **place)
        return rebuild(described, learned, backbone, file)
