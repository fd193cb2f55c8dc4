"""The training loop: an optimizer on a learner, exact on resume, and nothing lost on Ctrl-C."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastprompt.errors import InputError
from fastprompt.learners.stored import MODEL, restore_learned
from fastprompt.progress import progress_bar, say_line
from fastprompt.sources import FeatureSource, Images, as_source
from fastprompt.sources.features import queue_copy
from fastprompt.sources.source import check_labels
from fastprompt.training.environment import changed_arithmetic
from fastprompt.training.interrupt import Interrupted, InterruptFlag
from fastprompt.training.metrics import EpochMetrics, TrainingResult, peak_memory, reset_peak_memory
from fastprompt.training.run_folder import DIVERGED, STATE, RunFolder, epoch_metrics
from fastprompt.training.settings import TrainingSettings
from fastprompt.training.state import TrainingState

if TYPE_CHECKING:
    from fastprompt.learners import Learner

log = logging.getLogger(__name__)

READ_EVERY = 10  # steps between two reads of the loss: each read waits for the device
ORDER, TRANSFORMS, LOSS = 0, 1, 2  # what random numbers are drawn for


def fit(
    learner: Learner,
    source: Images,
    settings: TrainingSettings,
    *,
    run: RunFolder | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Train a learner in place.

    The order of the images, random transforms and the randomness inside the loss depend on the seed, the epoch and the
    step alone. A run that was stopped anywhere therefore ends with the same numbers as one that was not.

    Args:
        learner: What to train; its parameters are updated.
        source: Training images as features with labels, or as `as_source` takes them: a torch Dataset or DataLoader
            of (image, label), or (ImageFeatures, labels). Images are encoded once.
        settings: Optimizer, schedule, seed.
        run: Where state and metrics are kept. An unfinished run is resumed; of a complete one the learned tensors are
            loaded and nothing is trained. When training is done, call `run.save_model`.
        on_epoch: Called after every epoch, for instance to evaluate.
        progress: Whether to show a bar on standard error, or a line an epoch where that is no terminal.

    Raises:
        InputError: There is nothing to train or to train on, a label is out of range, the run's state does not fit, or
            the loss or a learned tensor is not finite any more (the same run with a smaller `lr` goes on from the state
            before), or another process trains in this run folder.
        Interrupted: Ctrl-C or SIGTERM; the state after the last step is in the run folder. A second one raises
            KeyboardInterrupt at once.
    """
    source = as_source(source, learner, what="training images", progress=progress)
    device = _check(learner, source, settings)
    with nullcontext() if run is None else run.locked():
        return _fit(learner, source, settings, run, device, on_epoch, progress)


def _fit(
    learner: Learner,
    source: FeatureSource,
    settings: TrainingSettings,
    run: RunFolder | None,
    device: torch.device,
    on_epoch: Callable[[EpochMetrics], None] | None,
    progress: bool,
) -> TrainingResult:
    if run is not None and run.complete:
        log.info("%s is complete: nothing to train", run.path)
        restore_learned(learner, run.load_model()[0], run.path / MODEL)
        return TrainingResult(tuple(epoch_metrics(run)))
    training = _Training(learner, source, settings, run, device)
    training.resume()
    learner.prepare(source)
    learner.train()
    reset_peak_memory(device)
    with _own_random_numbers(device), InterruptFlag() as interrupt, training.bar(progress) as bar:
        while training.epoch < settings.epochs:
            training.train_epoch(interrupt, bar)
            training.finish_epoch(on_epoch)
            say_line(training.history[-1].line(settings.epochs), bar, shown=progress)
            if interrupt.requested:
                raise training.interrupted(interrupt.requested)
    learner.eval()
    return TrainingResult(tuple(training.history))


class _Training:
    """A learner with its optimizer, at a step of an epoch (both counted from 0)."""

    def __init__(
        self,
        learner: Learner,
        source: FeatureSource,
        settings: TrainingSettings,
        run: RunFolder | None,
        device: torch.device,
    ) -> None:
        self.learner, self.source, self.settings, self.run, self.device = learner, source, settings, run, device
        self.optimizer = settings.make_optimizer(learner.parameters())
        self.names = [name for name, _ in learner.named_parameters()]  # in the optimizer's order
        self.steps = settings.steps_per_epoch(len(source))
        self.history: list[EpochMetrics] = []
        self._start_epoch(0)

    def _start_epoch(self, epoch: int) -> None:
        self.epoch, self.step, self.seconds = epoch, 0, 0.0
        # Losses stay on the device and are read now and then, so that a step does not wait for the one before.
        self.losses = torch.zeros(self.steps, device=self.device)
        self.correct = torch.zeros(self.steps, dtype=torch.int64, device=self.device)

    def train_epoch(self, interrupt: InterruptFlag, bar: tqdm) -> None:
        """Train the steps of this epoch that are left."""
        lr = self.settings.learning_rate(self.epoch)
        self.optimizer.param_groups[0]["lr"] = lr
        order = torch.randperm(len(self.source), generator=self._generator(ORDER, 0))
        started, seconds_before = time.perf_counter(), self.seconds
        while self.step < self.steps:
            size = self.settings.batch_size
            self._train_step(order[self.step * size : (self.step + 1) * size])
            self.step += 1
            bar.update()
            if self.step % READ_EVERY == 0 or self.step == self.steps or interrupt.requested:
                loss, accuracy = self._read_losses()
                bar.set_postfix(epoch=self.epoch + 1, loss=loss, accuracy=accuracy, lr=lr, refresh=False)
            self.seconds = seconds_before + time.perf_counter() - started
            if interrupt.requested:
                self.save()
                raise self.interrupted(interrupt.requested)

    def _train_step(self, indices: Tensor) -> None:
        generator = self._generator(LOSS, self.step, self.device)
        torch.manual_seed(generator.initial_seed())  # for layers such as nn.Dropout, which take no generator
        transforms = self._generator(TRANSFORMS, self.step)
        features = self.source.batch(indices, transforms, self.learner.reads).to(self.device)
        labels = queue_copy(self.source.labels[indices], self.device)
        scores = self.learner(features)
        self.optimizer.zero_grad()
        self.losses[self.step] = self.learner.backward(scores, labels, generator=generator)
        self.optimizer.step()
        self.correct[self.step] = (scores.logits.detach().argmax(1) == labels).sum()

    def _read_losses(self) -> tuple[float, float]:
        """Mean loss and accuracy of this epoch's steps so far; an error if a loss is not finite."""
        losses = self.losses[: self.step].cpu()
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            raise self._diverged(f"the loss became {float(losses[bad[0]])} in step {int(bad[0]) + 1}")
        return float(losses.mean()), int(self.correct[: self.step].sum()) / (self.step * self._images_per_step())

    def finish_epoch(self, on_epoch: Callable[[EpochMetrics], None] | None) -> None:
        """Report this epoch and save the state at the start of the next."""
        loss, accuracy = self._read_losses()
        self._check_learned()
        metrics = EpochMetrics(
            epoch=self.epoch + 1,
            loss=loss,
            accuracy=accuracy,
            lr=self.settings.learning_rate(self.epoch),
            seconds=self.seconds,
            images_per_second=self.steps * self._images_per_step() / self.seconds,
            peak_memory_bytes=peak_memory(self.device),
        )
        self.history.append(metrics)
        if self.run is not None:
            self.run.log("epoch", **asdict(metrics))
        if on_epoch is not None:
            on_epoch(metrics)
            self.learner.train()
        self._start_epoch(self.epoch + 1)
        self.save()

    def _check_learned(self) -> None:
        for name, tensor in self.learner.named_parameters():
            if not tensor.isfinite().all():
                raise self._diverged(f"{name} is not finite any more after the last step")

    def save(self) -> None:
        if self.run is None:
            return
        self._check_learned()
        buffers = {
            f"{kind}.{self.names[index]}": tensor
            for index, kinds in self.optimizer.state_dict()["state"].items()
            for kind, tensor in kinds.items()
            if tensor is not None
        }
        self.run.save_state(
            TrainingState(
                class_names=tuple(self.learner.class_names),
                fingerprint=self.learner.backbone.fingerprint,
                labels=self.source.labels,
                origin=self.source.origin,
                epoch=self.epoch,
                step=self.step,
                seconds=self.seconds,
                losses=self.losses[: self.step],
                correct=self.correct[: self.step],
                learned=self.learner.state_dict(),
                optimizer=buffers,
            )
        )

    def resume(self) -> None:
        """Go to the step that the run was left at, if there is one."""
        state = self.run.load_state() if self.run is not None else None
        if self.run is not None:
            self.run.drop_metrics_after(state.epoch if state else 0)
        if state is None:
            return
        file = self.run.path / STATE
        state.check_data(self.learner, self.source.labels, file)
        if other := changed_arithmetic(self.run.environment() | {"origin": state.origin}, origin=self.source.origin):
            log.warning("%s goes on, but may end with other last bits than unstopped: %s", self.run.path, other)
        restore_learned(self.learner, state.learned, file)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state.optimizer_state(self.names)})
        if state.epoch > self.settings.epochs or state.step > self.steps:
            raise InputError(f"{file}: expected at most epoch {self.settings.epochs}, step {self.steps}, got more")
        self._start_epoch(state.epoch)
        self.step, self.seconds = state.step, state.seconds
        self.losses[: self.step] = state.losses.to(self.device)
        self.correct[: self.step] = state.correct.to(self.device)
        self.history = epoch_metrics(self.run)

    def bar(self, progress: bool) -> tqdm:
        done = self.epoch * self.steps + self.step
        total = self.settings.epochs * self.steps
        return progress_bar(what="training", shown=progress, total=total, initial=done, unit="step")

    def interrupted(self, number: int) -> Interrupted:
        # Between two epochs the last step is that of the epoch before.
        between = self.step == 0 and self.epoch > 0
        epoch, step = (self.epoch, self.steps) if between else (self.epoch + 1, self.step)
        kept = f"{self.run.path} holds this state, and the same command resumes it" if self.run else "nothing was saved"
        where = f"in epoch {epoch} of {self.settings.epochs} after step {step} of {self.steps}"
        how = "terminated" if number == signal.SIGTERM else "interrupted"
        return Interrupted(f"{how} {where}: {kept}", epoch, step, number)

    def _diverged(self, what: str) -> InputError:
        lr, advice = self.settings.learning_rate(self.epoch), "try a smaller lr, or a warm-up"
        if self.run is not None and (self.run.path / STATE).is_file():
            self.run.log(DIVERGED, epoch=self.epoch + 1, lr=self.settings.lr)
            advice = f"{self.run.path} keeps the state before, and goes on with a smaller lr than {self.settings.lr:g}"
        return InputError(f"{what} of epoch {self.epoch + 1} at learning rate {lr:g}: {advice}")

    def _images_per_step(self) -> int:
        return min(self.settings.batch_size, len(self.source))

    def _generator(self, purpose: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
        return torch.Generator(device).manual_seed(_derived_seed(self.settings.seed, self.epoch, step, purpose))


def _derived_seed(*numbers: int) -> int:
    """One well-mixed 64-bit seed from several small numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _own_random_numbers(device: torch.device) -> AbstractContextManager[Any]:
    """Give the caller's random number generators back as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _check(learner: Learner, source: FeatureSource, settings: TrainingSettings) -> torch.device:
    """The learner's device, after checks that need no step."""
    if not isinstance(settings, TrainingSettings):
        raise InputError(
            "settings: expected TrainingSettings, such as published_settings(learner.recipes['default'], shots=16), "
            f"got {type(settings).__name__}"
        )
    parameters = dict(learner.named_parameters())
    if not parameters:
        raise InputError(f"learner must have something to train, but {learner.method} has no parameters")
    for name, parameter in parameters.items():
        if torch.finfo(parameter.dtype).bits < 32:
            raise InputError(f"{name} must be float32 to be trained, not {parameter.dtype}")
    check_labels(source, learner.class_names, "training images")
    return next(iter(parameters.values())).device
