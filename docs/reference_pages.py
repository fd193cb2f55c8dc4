"""Writes the pages of the site's reference from what `import fastprompt`, its rooms and `fastprompt_kernels` list.

Every public name stands on one page, that of its room, in the shortest form that reaches it. What is said of it comes
from its docstring when the site is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import fastprompt

# What has no docstring of its own, because it is neither a class nor a function.
VALUES = {
    "Cell": "What a row of a table may hold.",
    "Images": "What training and tests take in place of a source: see `as_source`.",
    "MEASURES": "Columns of tables by the name of their measure.",
    "METHODS": "Classes of learners by the name of their method.",
    "OPERATIONS": "Operations by name: the implementations of each, and why one cannot run on a device.",
    "PATCHES": "Pooled features and those of the patches: what a learner reads of an image.",
    "POOLED": "Pooled features alone: what a learner reads of an image.",
    "Reads": "What is read of an image: names of the tensors of `ImageFeatures`.",
    "OOD_KINDS": "Names of out-of-distribution scores.",
}


def pages() -> dict[str, str]:
    """Write all pages, by name, as reStructuredText."""
    rooms = [name for name in fastprompt.__all__ if isinstance(getattr(fastprompt, name), ModuleType)]
    front = {name: "" for name in fastprompt.__all__ if name not in rooms and name != "__version__"}
    front |= {name: home.split(".")[0] for home, names in fastprompt._HOMES.items() for name in names}
    described = {f"fastprompt.{name}" for name in front}
    found = {room: _room(room, [name for name, home in front.items() if home == room], described) for room in rooms}
    kernels = [_directive("automodule", "fastprompt_kernels", no_members=""), *_names("fastprompt_kernels")]
    found["fastprompt_kernels"] = _page("fastprompt_kernels", kernels)
    parts = [
        "``import fastprompt`` brings these names and the rooms below, each imported when it is first used.",
        _directive("currentmodule", "fastprompt"),
        _directive("autosummary", content=sorted(front.keys() - VALUES.keys(), key=str.lower)),
        *_names("fastprompt", [name for name, home in front.items() if not home]),
        _directive("toctree", content=list(found), maxdepth="1"),
    ]
    return found | {"index": _page("Reference", parts)}


def listed(module: str) -> list[str]:
    """Return the names in ``__all__`` of a module, in the order of the alphabet."""
    return sorted(getattr(import_module(module), "__all__", ()), key=str.lower)


def _room(room: str, front: Sequence[str], described: set[str]) -> str:
    """Write the page of a room: its names that `import fastprompt` brings, then the others."""
    module = f"fastprompt.{room}"
    others = [name for name in listed(module) if f"fastprompt.{name}" not in described and name not in described]
    described |= set(others)
    parts = [*_names("fastprompt", front), *_names(module, others)]
    if not listed(module):  # its modules are imported one by one
        folder = Path(import_module(module).__file__).parent
        parts += [_directive("automodule", f"{module}.{file.stem}") for file in sorted(folder.glob("[a-z]*.py"))]
    return _page(module, [_directive("automodule", module, no_members=""), *parts])


def _names(module: str, names: Sequence[str] | None = None) -> list[str]:
    """Write an entry for each name of a module."""
    parts = [_directive("currentmodule", module)]
    for name in listed(module) if names is None else names:
        made = getattr(import_module(module), name)
        if isinstance(made, type) or callable(made):
            parts.append(_directive("autoclass" if isinstance(made, type) else "autofunction", name))
        else:
            parts.append(_directive("py:data", name, content=[VALUES[name]]))
    return parts


def _directive(kind: str, argument: str = "", content: Iterable[str] = (), **options: str) -> str:
    lines = [f":{name.replace('_', '-')}: {value}".rstrip() for name, value in options.items()]
    body = "".join(f"\n   {line}".rstrip(" ") for line in [*lines, "", *content])
    return f".. {kind}:: {argument}".rstrip() + body


def _page(title: str, parts: Iterable[str]) -> str:
    return "\n\n".join([f"{title}\n{'=' * len(title)}", *parts]) + "\n"
