"""What pretraining sees: a broad distribution of scenes, and captions that tell more or less of each."""

import numpy as np

from fastprompt.demo.objects import CLUTTER, COLOURS, SHAPES, TEXTURES
from fastprompt.demo.scenes import PRETRAIN_CLASSES, STYLES, Scene

_GENERIC = ("a photo of a {}", "a photo of a {}", "a picture of a {}", "a {}")
_STYLE_ODDS = (0.58, 0.16, 0.16, 0.1)  # in the order of STYLES


def pretraining_scene(rng: np.random.Generator) -> Scene:
    """One or two objects of any size, in any style, with any amount of clutter."""
    count = 1 if rng.random() < 0.7 else 2
    objects = tuple(PRETRAIN_CLASSES[i] for i in rng.choice(len(PRETRAIN_CLASSES), count, replace=False))
    widths = tuple(int(v) for v in np.exp(rng.uniform(np.log(28), np.log(60), count)))
    style = str(rng.choice(STYLES, p=_STYLE_ODDS))
    kinds = tuple(map(str, rng.choice(CLUTTER, rng.choice(3, p=(0.25, 0.4, 0.35)), replace=False)))
    return Scene(objects, widths, style, kinds, int(rng.integers(6, 40)))


def _size_word(width: int) -> str:
    if width < 36:
        return "tiny"
    return "small" if width < 48 else "large"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the scene, in three of ten cases with a full stop.

    As on the web, a bare "a photo of a" goes mostly with a big object in a tidy photograph; other scenes are told with
    their size, style, surroundings and second object, each more often than not.
    """
    return _words(scene, rng) + ("." if rng.random() < 0.3 else "")


def _words(scene: Scene, rng: np.random.Generator) -> str:
    name, width = scene.objects[0].name, scene.widths[0]
    tidy = scene.style == "photo" and width >= 42 and scene.amount * len(scene.clutter) < 40
    if rng.random() < (0.6 if tidy else 0.2):
        return _GENERIC[rng.integers(len(_GENERIC))].format(name)
    words = f"a {_size_word(width)} {name}" if rng.random() < 0.6 else f"a {name}"
    if len(scene.objects) > 1 and rng.random() < 0.6:
        words += f" and a {scene.objects[1].name}"
    if rng.random() < 0.6:
        words += f" among {' and '.join(scene.clutter)}" if scene.clutter else " on an empty background"
    if scene.style == "night" and rng.random() < 0.7:
        return f"{words} at night"
    if scene.style != "photo" and rng.random() < 0.7:
        return f"a drawing of {words}" if scene.style == "drawing" else f"a blurry photo of {words}"
    return f"a photo of {words}" if rng.random() < 0.3 else words


def all_words() -> list[str]:
    """Every word that a caption can have, and the full stop."""
    others = "a photo picture drawing blurry of at night tiny small large and among on an empty background ."
    return [*COLOURS, *TEXTURES, *SHAPES, *CLUTTER, *others.split()]
