"""Writes docs/api.md, the page of the public API, from the source: run `python docs/write_api.py` after a change.

Public is what `import fastprompt`, its rooms and `fastprompt_kernels` list in `__all__`. The source is read, not
imported, so the page is the same on every machine.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
ROOTS = {"fastprompt": ROOT, "fastprompt_kernels": ROOT / "kernels"}
INTRODUCTION = """# Public API

Written by `python docs/write_api.py` from the source; a test keeps it up to date. Names and first sentences: the
docstrings say the rest (`help(fastprompt.fit)`).
"""


@dataclass(frozen=True)
class Place:
    """Where a public name is made: a statement of a module."""

    node: ast.AST
    module: str

    @property
    def parents(self) -> list[Place]:
        """Where the base classes are made that the module itself imports or makes, but for Python's and torch's."""
        bases = [base.id for base in getattr(self.node, "bases", []) if isinstance(base, ast.Name)]
        return [place for base in bases if (place := place_of(self.module, base)) is not None]


def page() -> str:
    """The whole page."""
    flat = public_names("fastprompt")
    rooms = sorted(name for name in flat if folder_of(f"fastprompt.{name}") is not None)
    parts = [INTRODUCTION, "## From `import fastprompt`\n"]
    parts += [entry("fastprompt", name) for name in flat if name not in rooms and name != "__version__"]
    parts.append("- `__version__: str`: the version of this package.\n")
    for room in [*(f"fastprompt.{room}" for room in rooms), "fastprompt_kernels"]:
        parts.append(f"\n## `{room}`\n\n{first_sentence(tree_of(room))}\n")
        names = public_names(room)
        if known := [name for name in names if name in flat]:
            parts.append(f"From `import fastprompt`, too: {', '.join(f'`{name}`' for name in known)}.\n")
        parts += [entry(room, name) for name in names if name not in flat]
        if not names:
            parts += [module_line(room, file) for file in sorted(folder_of(room).glob("*.py")) if file.stem[0] != "_"]
    return "\n".join(parts)


def folder_of(module: str) -> Path | None:
    """The folder of a package; None for what is no package."""
    folder = ROOTS[module.split(".")[0]].joinpath(*module.split("."))
    return folder if folder.is_dir() else None


def file_of(module: str) -> Path:
    """The file of a module or package."""
    folder = folder_of(module)
    return (
        folder / "__init__.py"
        if folder
        else ROOTS[module.split(".")[0]].joinpath(*module.split(".")).with_suffix(".py")
    )


def tree_of(module: str) -> ast.Module:
    """The parsed source of a module."""
    return ast.parse(file_of(module).read_text(encoding="utf-8"))


def public_names(module: str) -> list[str]:
    """What a module lists in ``__all__``, in the order of the alphabet; nothing if it has none."""
    for node in tree_of(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value), key=str.casefold)
    return []


def place_of(module: str, name: str) -> Place | None:
    """The statement that makes a name, found through the imports of it; None for what is not ours."""
    if module.split(".")[0] not in ROOTS:
        return None
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            return place_of(f"{module}.{node.module}" if node.level else node.module, name)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return Place(node, module)
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if name in map(ast.unparse, targets):
            return Place(node, module)
    return None


def entry(module: str, name: str) -> str:
    """One name of a module: its signature and first sentence, and those of the public methods of a class."""
    place = place_of(module, name)
    if place is None:
        raise LookupError(f"{module}.{name} is listed in __all__, but nothing makes it")
    if isinstance(place.node, ast.FunctionDef):
        return function_line(place.node, name)
    if not isinstance(place.node, ast.ClassDef):
        line = file_of(place.module).read_text(encoding="utf-8").splitlines()[place.node.lineno - 1]
        comment = re.search(r"#\s*(.*)", line)
        kind = f": {ast.unparse(place.node.annotation)}" if isinstance(place.node, ast.AnnAssign) else ""
        return f"- `{name}{kind}`" + (f": {comment[1]}." if comment else "")
    lines = [f"- `class {name}{constructor(place)}`: {first_sentence(place.node)}"]
    inherited = {method.name for parent in place.parents for method in methods(parent)}
    own = [method for method in methods(place) if method.name[0] != "_" and method.name not in inherited]
    return "\n".join([*lines, *("  " + function_line(method, method.name, method=True) for method in own)])


def methods(place: Place) -> list[ast.FunctionDef]:
    """The methods of a class, and those that it inherits from classes of ours."""
    inherited = [method for parent in place.parents for method in methods(parent)]
    return [node for node in getattr(place.node, "body", []) if isinstance(node, ast.FunctionDef)] + inherited


def function_line(node: ast.FunctionDef, name: str, method: bool = False) -> str:
    """A function with its signature and first sentence; a property without parentheses."""
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    signature = returns.replace(" -> ", ": ") if "property" in decorators else f"({arguments(node, method)}){returns}"
    return f"- `{name}{signature}`: {first_sentence(node)}"


def arguments(node: ast.FunctionDef, method: bool) -> str:
    """The arguments of a function as written, without ``self`` and ``cls``."""
    given = ast.unparse(node.args)
    return re.sub(r"^(self|cls)(, |$)", "", given) if method else given


def constructor(place: Place) -> str:
    """The arguments of a class: those of ``__init__``, or the fields of a dataclass."""
    if made := [method for method in methods(place) if method.name == "__init__"]:
        return f"({arguments(made[0], method=True)})"
    if not any("dataclass" in ast.unparse(decorator) for decorator in place.node.decorator_list):
        return ""
    fields = [
        part for part in place.node.body if isinstance(part, ast.AnnAssign) and "ClassVar" not in ast.unparse(part)
    ]
    return f"({', '.join(ast.unparse(field) for field in fields)})"


def first_sentence(node: ast.AST) -> str:
    """The first sentence of a docstring."""
    paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.?])\s+(?=[A-Z`\"])", paragraph)[0]


def module_line(room: str, file: Path) -> str:
    """A module of a room that lists no names, with its first sentence."""
    return f"- `{room}.{file.stem}`: {first_sentence(tree_of(f'{room}.{file.stem}'))}"


if __name__ == "__main__":
    PAGE.write_text(page() + "\n", encoding="utf-8")
