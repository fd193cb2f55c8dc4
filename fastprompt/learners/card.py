"""The card of a learner on the Hugging Face Hub: what it is, on what it stands, and how it is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

SHOWN_CLASSES = 20

CARD = """---
library_name: fastprompt
tags:
- clip
- prompt-learning
- {method}
---

# {title}: {count} classes on {backbone}

{description}

| | |
| --- | --- |
| Method | {method} |
| Backbone | {backbone}, weights {pretrained}, frozen; fingerprint {fingerprint} |
| Learned numbers | {learned} |
| Options | {options} |
| Training | {training} |
| Accuracy | {accuracy} |

Classes: {classes}.

```python
import fastprompt

learner = fastprompt.Learner.from_pretrained("{repository}")
pixels = fastprompt.image_transform(learner.backbone)(fastprompt.load_image("picture.jpg"))
probabilities = learner.predict(learner.backbone.encode_images(pixels[None]))  # (1, {count})
```
"""


def card_text(
    learner: nn.Module, described: Mapping[str, Any], *, repository: str, training: object, accuracy: float | None
) -> str:
    """Write the card of a learner in Markdown.

    Args:
        learner: what is stored.
        described: by ``describe``.
        repository: where it can be loaded from.
        training: how it was trained, such as ``TrainingSettings``; None if that is not known.
        accuracy: share of test images that it named right; None if that is not known.
    """
    names = described["class_names"]
    further = f" and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else ""
    words = {
        "description": " ".join((type(learner).__doc__ or "").split("\n\n")[0].split()),
        "pretrained": described["pretrained"] or "as they come with it",
        "learned": f"{sum(parameter.numel() for parameter in learner.parameters()):,}",
        "options": ", ".join(f"{name} {value}" for name, value in described["options"].items()) or "none",
        "training": "not recorded" if training is None else str(training),
        "accuracy": "not recorded" if accuracy is None else f"{100 * accuracy:.1f} % of the test images",
        "classes": ", ".join(names[:SHOWN_CLASSES]) + further,
    }
    of_learner = {name: described[name] for name in ("method", "backbone", "fingerprint")}
    shown = {name: _plain(str(text)) for name, text in {**of_learner, **words}.items()}
    return CARD.format(title=type(learner).__name__, count=len(names), repository=repository, **shown)


def _plain(text: str) -> str:
    """Text in one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
