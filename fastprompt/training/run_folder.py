"""A run on disk: its config, its environment, its metrics, its state while it trains, its model when it is done."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastprompt.documents import absolute_path, build, check_object, check_type, parse_json, read_json, read_text
from fastprompt.errors import InputError
from fastprompt.files import LOCK, TEMPORARY, locked, write_file
from fastprompt.learners.stored import MODEL, Description, read_learner, write_learner
from fastprompt.training.environment import environment
from fastprompt.training.metrics import EpochMetrics
from fastprompt.training.state import TrainingState

if TYPE_CHECKING:
    from fastprompt.learners import Learner

log = logging.getLogger(__name__)

CONFIG, ENVIRONMENT, METRICS = "config.json", "environment.json", "metrics.jsonl"
STATE = "training_state.safetensors"
NOT_SET = "(not set)"
DIVERGED = "diverged"  # kind of line in metrics.jsonl, and the entry of config.json about earlier learning rates


class RunFolder:
    """One training run in one folder. Every file is replaced as a whole, so that a killed process leaves no half file.

    The folder becomes a run with the first write, not before: a run that fails on its input leaves nothing behind. What
    writes locks the folder, for the write alone unless ``locked`` holds it for longer.

    Attributes:
        path: The folder.
        config: What the run was asked for, as it stands in config.json.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        self.config = dict(config)
        self._locked = False

    @classmethod
    def create_or_resume(cls, path: str | Path, config: Mapping[str, Any]) -> RunFolder:
        """The run folder at `path`: a new one if there is nothing, the existing one if its config is the same.

        A run whose training diverged may go on with a smaller `lr` and otherwise the same config.

        Args:
            path: The folder.
            config: The resolved settings: what JSON can hold, and paths, which become strings.

        Raises:
            InputError: The folder holds a run with another config, or something that is not a run.
        """
        path, config = Path(path), json.loads(json.dumps(config, default=str))
        if is_run(path):
            run = cls.open(path)
            run._check_config(config)
            return run
        if path.exists() and not (path.is_dir() and all(_belongs_to_start(file) for file in path.iterdir())):
            raise InputError(
                f"{path} must be absent, empty or an earlier run, but it is something else: choose another --out"
            )
        return cls(path, config)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The existing run at `path`.

        Raises:
            InputError: There is no run, or its config.json is damaged.
        """
        path = Path(path)
        if not is_run(path):
            raise InputError(f"{path} must be a run folder, with {CONFIG} and {ENVIRONMENT} in it, and it is not")
        config = read_json(path / CONFIG, "run")
        check_object(config, f"run {path / CONFIG}")
        return cls(path, config)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only process that writes into this run; may be nested.

        Raises:
            InputError: Another process holds the folder, or has meanwhile made a run with another config of it.
        """
        if self._locked:
            yield
            return
        with locked(self.path):
            if is_run(self.path):
                self._take_over()
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    def _take_over(self) -> None:
        """Bring the run that is on disk up to this config, and finish what a killed process left half done."""
        stored = RunFolder.open(self.path)
        lr = stored.config.get("lr")
        stored._check_config(self.config)
        self.config = stored.config
        if self.config.get("lr") != lr:
            write_file(self.path / CONFIG, json.dumps(self.config, indent=2) + "\n")
            log.warning("%s diverged at lr = %g: it goes on with %g", self.path, lr, self.config["lr"])
        if self.complete:  # between the two, training was killed
            (self.path / STATE).unlink(missing_ok=True)

    def _check_config(self, config: dict[str, Any]) -> None:
        """Raise where `config` is not that of this run; take a smaller lr over from it where the run has diverged."""
        old, new = _flat({**self.config, DIVERGED: None}), _flat({**config, DIVERGED: None})
        names = [*new, *(old.keys() - new.keys())]
        different = [name for name in names if old.get(name, NOT_SET) != new.get(name, NOT_SET)]
        if different == ["lr"] and (diverged := self.metrics(DIVERGED)) and _is_smaller(new.get("lr"), old.get("lr")):
            earlier = {"until_epoch": diverged[-1].get("epoch", 1) - 1, "lr": old["lr"]}
            before = self.config.get(DIVERGED, [])
            check_type(before, list, f"run {self.path / CONFIG}: {DIVERGED}")
            self.config |= {"lr": new["lr"], DIVERGED: [*before, earlier]}
        elif different:
            name = different[0]
            other = re.sub(r"[^\w.]+", "-", f"{name}-{new.get(name, 'unset')}")[:60].strip("-")
            raise InputError(
                f"{self.path} holds a run with {name} = {old.get(name, NOT_SET)}, but now {name} = "
                f"{new.get(name, NOT_SET)}: choose another --out, such as {self.path}-{other}, or go back to "
                "the old value to resume that run"
            )

    @property
    def complete(self) -> bool:
        """Whether training has finished: the model is written last."""
        return (self.path / MODEL).is_file()

    def log(self, kind: str, **values: Any) -> None:
        """Add a line to metrics.jsonl: {"kind": kind, ...values}; give `epoch` (from 1) where there is one."""
        self._write_metrics([*self.metrics(), {"kind": kind, **values}])

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl in order, all or those of one kind.

        Raises:
            InputError: A line is not a JSON object, or its `epoch` is no whole number.
        """
        file = self.path / METRICS
        if not file.exists():
            return []
        parsed = []
        for number, text in enumerate(read_text(file, "metrics").split("\n"), start=1):
            if not text:  # behind the last line
                continue
            where = f"metrics {file}, line {number}"
            line = parse_json(text, where)
            check_object(line, where)
            check_type(line.get("epoch", 0), int, f"{where}: epoch")
            parsed.append(line)
        return [line for line in parsed if kind in (None, line.get("kind"))]

    def drop_metrics_after(self, epoch: int) -> None:
        """Remove the lines of epochs that will be trained again: all whose `epoch` (from 1) is above this one."""
        lines = self.metrics()
        kept = [line for line in lines if line.get("epoch", 0) <= epoch]
        if len(kept) < len(lines):
            self._write_metrics(kept)

    def environment(self) -> dict[str, Any]:
        """What the run was begun with; empty for one that is not on disk yet.

        Raises:
            InputError: environment.json is damaged.
        """
        file = self.path / ENVIRONMENT
        if not file.exists():
            return {}
        found = read_json(file, "environment")
        check_object(found, f"environment {file}")
        return found

    def save_state(self, state: TrainingState) -> None:
        """Write the state that an unfinished training resumes from."""
        with self._writing():
            state.write(self.path / STATE)

    def load_state(self) -> TrainingState | None:
        """The saved state; None if there is none.

        Raises:
            InputError: The file is damaged.
        """
        file = self.path / STATE
        return TrainingState.from_file(file) if os.path.lexists(file) else None

    def save_model(self, learner: Learner, weights_dir: Path | None = None) -> None:
        """Write the learner, which completes the run; the training state is not needed any more.

        Args:
            learner: Its learned tensors, and what it is made from.
            weights_dir: Where the weights of its backbone were downloaded to, if not to open_clip's own folder.
        """
        where = None if weights_dir is None else str(absolute_path(weights_dir))
        with self._writing():
            write_learner(self.path / MODEL, learner, weights_dir=where)
            (self.path / STATE).unlink(missing_ok=True)

    def load_model(self) -> tuple[dict[str, Tensor], Description]:
        """The learned tensors on the CPU, and what the learner is made from.

        Raises:
            InputError: Training has not finished, or the file is damaged.
        """
        if not self.complete:
            raise InputError(
                f"{self.path / MODEL} must exist, but this run has not finished training: train it again to resume it"
            )
        return read_learner(self.path / MODEL)

    def _write_metrics(self, lines: list[dict[str, Any]]) -> None:
        with self._writing():
            write_file(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in lines))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Lock the folder, and make it a run if it is none yet."""
        with self.locked():
            if not is_run(self.path):
                # config.json comes second: where it is, the folder is a run.
                write_file(self.path / ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")
                write_file(self.path / CONFIG, json.dumps(self.config, indent=2) + "\n")
            yield


def epoch_metrics(run: RunFolder) -> list[EpochMetrics]:
    """The epochs that a run has trained, from the first."""
    where = f"metrics {run.path / METRICS}"
    lines = run.metrics("epoch")
    return [build(EpochMetrics, {name: line[name] for name in line if name != "kind"}, where) for line in lines]


def is_run(path: Path) -> bool:
    """Whether a folder holds a run: finished, unfinished or damaged."""
    return (path / CONFIG).is_file() and (path / ENVIRONMENT).is_file()


def _belongs_to_start(file: Path) -> bool:
    """Whether a process that was killed before its folder became a run left this file."""
    return file.name in (ENVIRONMENT, LOCK) or file.name.endswith(TEMPORARY)


def _is_smaller(new: Any, old: Any) -> bool:
    return isinstance(new, int | float) and isinstance(old, int | float) and new < old


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, and lists of strings (class names) as one setting an item."""
    if isinstance(config, list) and config and all(isinstance(item, str) for item in config):
        return {f"{prefix.rstrip('.')}[{index}]": item for index, item in enumerate(config)}
    if not isinstance(config, dict) or not config:
        return {prefix.rstrip("."): config}
    return {name: value for key, below in config.items() for name, value in _flat(below, f"{prefix}{key}.").items()}
