"""What a run ran on: versions, machine, device, commit, date and command line."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastprompt.version import __version__


def environment() -> dict[str, Any]:
    """A description of this process, ready for JSON; None where something is not there.

    An accelerator is named only if it is in use already: asking must not initialise one.
    """
    return {
        "fastprompt": __version__,
        "triton": _version("triton"),
        "open_clip": _version("open_clip_torch"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **arithmetic(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }


def arithmetic() -> dict[str, Any]:
    """What the last bits of a result depend on, beside what was asked for."""
    return {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu",
    }


def changed_arithmetic(before: Mapping[str, Any], **more: Any) -> str:
    """What `arithmetic` and `more` were before and are otherwise now, in words; empty if nothing changed."""
    now = arithmetic() | more
    return "; ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name])


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package is imported from; None for an installed package."""
    root = Path(__file__).parents[2]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    head = subprocess.run([git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return head.stdout.strip() or None
