"""The house rules that no single room can test: who imports whom, what an import costs, what is shipped."""

import ast
import configparser
import re
import runpy
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the foundation up; a room may import the rooms before it.
ROOMS = [
    "kernels",
    "errors",
    "documents",
    "files",
    "version",
    "progress",
    "sources",
    "backbone",
    "learners",
    "layers",
    "training",
    "evaluation",
    "report",
    "experiment",
    "exchange",
    "demo",
]
# Other code's checkpoints are pickles: they are read here alone, by torch's reader that executes nothing.
CHECKPOINTS = ROOT / "fastprompt" / "exchange" / "checkpoint.py"
DATA_MAY_IMPORT = {"data", "documents", "errors", "files", "progress", "version"}
LIBRARY_FILES = sorted([*ROOT.glob("fastprompt/**/*.py"), *ROOT.glob("kernels/**/*.py")])


MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removeprefix("kernels.").removesuffix(".__init__"): file
    for file in LIBRARY_FILES
}


def imported(file):
    """Full names of the modules that a file imports, under TYPE_CHECKING, too."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    pending, names = list(tree.body), set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = file.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            whole = {f"{module}.{alias.name}" for alias in node.names}
            names |= (whole & MODULES.keys()) | ({module} if whole - MODULES.keys() else set())
        pending += ast.iter_child_nodes(node)
    return names


# The hub's side of learners makes them by name; it stands below them, as a base class.
KNOWN_CIRCLE = {"fastprompt.learners.stored": {"fastprompt.learners", "fastprompt.learners.base"}}


def test_modules_import_in_no_circle():
    """Neither for type checkers alone, nor inside of functions."""
    graph = {name: imported(file) & MODULES.keys() for name, file in MODULES.items()}
    for name, known in KNOWN_CIRCLE.items():
        assert known <= graph[name], f"{name}: its circle was mended, so it can go from the list"
        graph[name] -= known
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def room(module):
    first, *rest = module.split(".")
    if first in ("fastprompt_kernels", "kernels"):
        return "kernels"
    return rest[0] if first == "fastprompt" and rest else None


@pytest.mark.parametrize("file", LIBRARY_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    here = "kernels" if parts[0] == "kernels" else parts[1]
    rooms = {room(module) for module in imported(file)} - {None, here}
    if here in ("__init__", "__main__", "cli", "console", "doctor"):
        return  # the roof: they may import everything
    if here == "data":
        assert rooms <= DATA_MAY_IMPORT
        return
    assert here in ROOMS, f"{here} is a new room: give it a place in ROOMS"
    below = set(ROOMS[: ROOMS.index(here)]) | ({"data"} if here in ("experiment", "exchange", "demo") else set())
    assert rooms <= below, f"{here} imports upward: {rooms - below}"


@pytest.mark.parametrize("file", LIBRARY_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_kernels_import_triton_and_none_unpickles(file):
    modules = {module.split(".")[0] for module in imported(file)}
    if "kernels" not in file.parts:
        assert "triton" not in modules
    text = file.read_text(encoding="utf-8")
    assert not modules & {"pickle", "cloudpickle", "dill", "joblib"}
    assert text.count("torch.load(") == (1 if file == CHECKPOINTS else 0)
    assert "torch.load(" not in text or text.count("weights_only=True") == 1


@pytest.mark.parametrize("package", ["fastprompt", "fastprompt_kernels"])
def test_import_brings_neither_triton_nor_a_device(package):
    program = (
        f"import sys, {package}, torch; "
        "assert 'triton' not in sys.modules, 'triton was imported'; "
        "assert not torch.cuda.is_initialized(), 'a device was initialised'; "
        "assert 'matplotlib' not in sys.modules and 'open_clip' not in sys.modules, 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_kernels_are_imported_with_torch_alone():
    program = (
        "import sys, torch; before = set(sys.modules); import fastprompt_kernels; "
        "brought = {name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names; "
        "assert brought <= {'fastprompt_kernels', 'torch'}, brought"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_versions_are_written_alike():
    version = runpy.run_path(str(ROOT / "fastprompt" / "version.py"))["__version__"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {version} - 20" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    ruff = re.search(r'"ruff==(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    assert f"rev: v{ruff}\n" in (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")


def test_oracles_are_independent_of_what_they_judge():
    for file in ROOT.glob("transcriptions/*.py"):
        ours = {"fastprompt", "fastprompt_kernels", "benchmarks", "tests"}
        assert not ours & {module.partition(".")[0] for module in imported(file)}, file


def test_every_package_is_shipped():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    present = {
        ".".join(folder.relative_to(root).parts)
        for root in (ROOT, ROOT / "kernels")
        for top in ("fastprompt", "fastprompt_kernels")
        for folder in [root / top, *(root / top).rglob("*")]
        if folder.is_dir() and folder.name != "__pycache__" and any(file.is_file() for file in folder.iterdir())
    }
    assert listed == present  # folders of data, too: setuptools takes them for packages and warns of others


def test_public_names_exist():
    import fastprompt

    for name in fastprompt.__all__:
        assert getattr(fastprompt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Gallop'"):
        _ = fastprompt.Gallop


def seen_by_type_checkers(file):
    """Names that a module imports outside of functions, under TYPE_CHECKING, too."""
    blocks = [node.body if isinstance(node, ast.If) else [node] for node in ast.parse(file.read_text()).body]
    imports = [node for block in blocks for node in block if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def test_public_names_are_written_out_for_type_checkers():
    import fastprompt

    seen = seen_by_type_checkers(ROOT / "fastprompt" / "__init__.py")
    assert set(fastprompt.__all__) <= seen
    lists = {"_ROOMS", "_HOMES", "annotations", "import_module", "TYPE_CHECKING"}
    assert seen - lists == set(fastprompt.__all__), "what is imported is public, and the other way round"


def test_every_method_and_room_is_reached_from_the_front():
    import fastprompt
    from fastprompt import learners

    ours = {cls.__name__ for cls in learners.METHODS.values() if cls.__module__.startswith("fastprompt.learners.")}
    assert len(ours) == 12
    assert ours <= set(learners.__all__) & set(fastprompt.__all__)
    assert ours <= seen_by_type_checkers(ROOT / "fastprompt" / "learners" / "__init__.py")
    rooms = {path.parent.name for path in ROOT.glob("fastprompt/*/__init__.py")} - {"demo"}
    assert rooms <= set(fastprompt.__all__)


@pytest.mark.slow
@pytest.mark.parametrize("use", ["learners.CoOp", "layers.TopKLocalHead", "training.fit", "data.few_shot", "load_run"])
def test_names_are_there_after_one_import(use):
    subprocess.run([sys.executable, "-c", f"import fastprompt; fastprompt.{use}"], check=True)
