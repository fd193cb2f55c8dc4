"""The command line of ``python -m benchmarks gpu``."""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import zipfile
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.plan import STEPS, Plan
from benchmarks.gpu.processes import ROOT

DESCRIPTION = """Measure everything that only a machine with a GPU can tell, in 8 minutes and most telling first.

It needs python3 with torch and Triton, no network and no virtual environment: run it in the root of a checkout. Every
step has processes of its own and a time limit; what fails is written down and the next step goes on. Results are
written as they come; the same command goes on where it was stopped, wherever that was. Steps:

"""
# By name of their modules, what the steps import beside torch and Triton, and what it is called on PyPI.
PACKAGES = {
    "numpy": "numpy", "safetensors": "safetensors", "tqdm": "tqdm", "open_clip": "open_clip_torch", "ftfy": "ftfy",
    "wcwidth": "wcwidth", "typeguard": "typeguard", "regex": "regex", "timm": "timm", "torchvision": "torchvision",
    "torchmetrics": "torchmetrics",
    "huggingface_hub": "huggingface_hub", "matplotlib": "matplotlib", "jinja2": "jinja2", "PIL": "pillow",
    "pytest": "pytest", "xdist": "pytest-xdist", "hypothesis": "hypothesis",
}  # fmt: skip
NEEDED = ("numpy", "safetensors", "tqdm")  # by every step, or by the command itself
# Wheels that are never unpacked: pip brings them along for what needs torch, which is here.
HERE = ("torch", "triton", "nvidia_", "cuda_")


def parser() -> argparse.ArgumentParser:
    """The options."""
    steps = "\n".join(f"  {step.name:12} {step.title}" for step in STEPS)
    one = argparse.ArgumentParser(
        "python -m benchmarks gpu",
        description=DESCRIPTION + steps,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="FOLDER", help="results (runs/gpu)")
    one.add_argument("--pack", type=Path, metavar="FILE", help="results in one zip file (FOLDER.zip)")
    one.add_argument("--minutes", type=float, default=8.0, metavar="M", help="for all steps together (8)")
    one.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], metavar="STEP",
                     help="these steps alone; what failed in them is tried again")  # fmt: skip
    one.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels of Python packages that are missing here")
    one.add_argument("--quick", action="store_true", help="a few items of each step")
    one.add_argument("--rehearse", action="store_true",
                     help="on a CPU, with Triton's interpreter and tiny shapes: does everything run?")  # fmt: skip
    one.add_argument("--report", action="store_true", help="only draw FOLDER/report.md from what is there")
    return one


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 for bad input, 130 after Ctrl-C or SIGTERM."""
    options = parser().parse_args(sys.argv[2:] if arguments is None else arguments)
    sys.path.append(str(ROOT / "kernels"))
    site = None
    if options.wheels is not None:
        try:
            site = unpack(options.wheels, options.out.resolve() / "site")
        except (OSError, zipfile.BadZipFile) as error:
            print(f"benchmarks gpu: error: --wheels: expected a folder of wheels, got {error}", file=sys.stderr)
            return 2
        sys.path.insert(0, str(site))
    if sentence := missing():
        print(sentence, file=sys.stderr)
        if lacking := [name for name in NEEDED if find_spec(name) is None]:
            print(f"benchmarks gpu: error: no step runs without {', '.join(lacking)}", file=sys.stderr)
            return 2
    from fastprompt.errors import InputError  # torch is first needed here

    signal.signal(signal.SIGTERM, _stop)
    try:
        _run(options, site)
    except InputError as error:
        print(f"benchmarks gpu: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks gpu: interrupted; what is done is written, and the same command goes on", file=sys.stderr)
        return 130
    return 0


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _run(options: argparse.Namespace, site: Path | None) -> None:
    from benchmarks.gpu import runner
    from fastprompt.errors import InputError
    from fastprompt.files import locked

    out = options.out.resolve()
    pack = out.with_name(f"{out.name}.zip") if options.pack is None else options.pack.resolve()
    if options.report:
        _draw(out)
        return
    if not options.minutes > 0:
        raise InputError(f"--minutes: expected a number above 0, got {options.minutes}")
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        raise InputError("expected a CUDA or ROCm device, but torch sees none: --rehearse runs all steps on a CPU")
    plan = Plan(options.rehearse, options.quick, out)
    with locked(out):
        _check_folder(plan)
        steps = [step for step in STEPS if options.only is None or step.name in options.only]
        again = options.only is not None
        try:
            runner.run_steps(steps, plan, pack, seconds=60 * options.minutes, again=again, site=site)
        finally:
            _draw(out)
            runner.store.pack(out, pack)
            print(pack)


def _draw(out: Path) -> None:
    """Draw the page. Where a package for that is missing, rows and logs are no less there."""
    try:
        from benchmarks.gpu import report
    except ImportError as error:
        print(f"No page was drawn, for {error}; --report draws it, also elsewhere.", file=sys.stderr)
        return
    print(report.write(out))


def _check_folder(plan: Plan) -> None:
    """Results of other code, or of a rehearsal, are not mixed with those of this run."""
    from fastprompt.errors import InputError
    from fastprompt.files import write_file

    file, own = plan.out / "plan.json", {"rehearse": plan.rehearse, "quick": plan.quick, "source": source()}
    if not file.exists():
        write_file(file, json.dumps(own))
    elif (found := json.loads(file.read_text(encoding="utf-8"))) != own:
        differ = ", ".join(key for key in own if found.get(key) != own[key])
        raise InputError(f"--out: expected results of the same code and options, got others in {plan.out} ({differ})")


def source() -> str:
    """A short hash of the Python code that is measured and that measures."""
    digest = hashlib.sha256()
    for file in sorted(
        path
        for room in ("kernels", "fastprompt", "benchmarks", "transcriptions")
        for path in (ROOT / room).rglob("*.py")
    ):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def unpack(wheels: Path, site: Path) -> Path:
    """Unpack wheels into a folder for the path: packages read files of their own, which they cannot in an archive.

    Those of torch and of what comes with it are left out: the machine's own are what is measured.

    Raises:
        FileNotFoundError: there is none.
    """
    found = [wheel for wheel in sorted(wheels.glob("*.whl")) if not _is_here(wheel)]
    if not found:
        raise FileNotFoundError(f"{wheels}, which has no *.whl")
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return site


def _is_here(wheel: Path) -> bool:
    name = wheel.name.partition("-")[0]
    return any(name.startswith(one) if one.endswith("_") else name == one for one in HERE)


def missing() -> str:
    """One sentence about packages that cannot be imported here, and how they are brought; empty if there is none."""
    names = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if not names:
        return ""
    # With torch's version, so that torchvision's fits it, and with all that they need themselves.
    given = [f"torch=={metadata.version('torch').partition('+')[0]}", *names]
    command = f"python3 -m pip download --only-binary=:all: -d wheels {' '.join(given)}"
    return (
        f"Missing here: {', '.join(names)}; steps that need them are left out: on a machine with a network, run "
        f"'{command}' with this version of Python, and give --wheels wheels; torch and CUDA need not be among them."
    )
