"""The fine-tuning loop: adversarial training through the quantizers, with validation."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import DataError, SpecError
from ..core.module_utils import modes_restored
from ..core.run_dir import locked
from ..core.runtime import seeded, true_float32, uninterrupted
from ..core.specs import Threat, plain
from ..data.holdout import has_labels
from ..data.train_batches import Source, hold_out
from ..nn.memory_format import order_weights, takes_channels_last
from ..nn.quant_activation import QuantActivation
from .batchnorm import reestimate
from .certified import CertifiedObjective, certified_validation, check_certified, own_lr
from .history import Epoch, History
from .lr_finder import LR_RANGE, auto_lr
from .model_state import copied
from .optim import parameter_groups
from .pixel_batches import of_several
from .recipes import Recipe
from .recovery import RETRIES, Remedy, collapsed, one_step, remedy
from .resumable_run import ResumableRun
from .train_step import needs_several
from .validation import accuracy_under, as_good, parent_accuracy, validate

# Seconds between two writes of the state within an epoch.
_SAVE_EVERY = 60.0


class Trainer(ResumableRun):
    """Runs the epochs of a fine-tune.

    Args:
        renew: whether to estimate BatchNorm statistics before training.
        extends: whether a run directory of fewer epochs may be resumed.
        others: as :func:`fit`.
    """

    def __init__(self, model: nn.Module, source: Source, threat: Threat, recipe: Recipe,
                 epochs: int, train: str, run_dir: Path | None, seed: int, progress: bool,
                 renew: bool, extends: bool) -> None:
        super().__init__(model, source, threat, recipe, epochs, train, run_dir, seed, progress)
        self.renew, self.extends = renew, extends

    def run(self) -> History:
        """Train, and leave the best epoch's weights in the model."""
        saved = self.directory.read(self.batches.device, "epochs" if self.extends else None)
        torch.manual_seed(self.seed)
        self.rng = torch.get_rng_state()
        parameter_groups(self.model, self.recipe, 1.0, self.train)  # raises before work is done
        # intervals that TF32 has rounded train much worse
        precision = true_float32() if self.recipe.certifies else nullcontext()
        try:
            with uninterrupted() as interrupt, precision:
                self.distributed.same(self.model)
                self._begin(saved)
                interrupt()
                while self.epoch < self.epochs:
                    if self.epoch == self.until:
                        self._extend()
                    self._train_epoch(interrupt)
                    self.save()
                    interrupt()
                self.model.load_state_dict(self.best)
                levels = self.levels()
        except KeyboardInterrupt:
            raise self.interrupted() from None
        note = f"returned epoch {self.chosen}"
        self.bar.note = f"{self.accuracies()}, {note}" if self.accuracies() else note
        self.bar.close()
        if self.distributed.is_main:
            self.directory.tell(*self.record(levels))
        return self.result(levels)

    def _begin(self, saved: dict[str, Any] | None) -> None:
        """Check the model and its first batch, and resume from a saved state or start.

        The float parent is measured before the BatchNorm statistics are estimated again.
        """
        read = (self.batches(batch, 0) for batch in self.source.epoch(0, 0))
        for first, labels in of_several(read, lambda batch: len(batch[0])):
            pixels = first[:2]
            if takes_channels_last(self.pixel_model, pixels):
                order_weights(self.pixel_model, torch.channels_last)
            self.train_step.check_precision(pixels)
            if not saved:
                self.train_step.check(first, labels, self._trained())
            break
        if self.recipe.distill and self.source.val is not None \
                and not has_labels(self.source.val):
            self.source.val = self.source.some = None
            self.log_event("no held-out image has a label, so the last epoch is returned instead "
                           "of the best one. Pass val= with labels")
        if not saved:
            self.parent_clean = parent_accuracy(self.pixel_model, self.source.val, self.batches)
        if self.renew:
            reestimate(self.pixel_model, (self.batches(batch, number)[0] for number, batch
                                          in enumerate(self.source.epoch(0, 0))))
            self.distributed.average([*self.model.buffers()])
            self.best = self.start = copied(self.model)
        if saved:
            self.resume(saved)
            return
        self.prepare_optimizer(self.recipe.lr or self._own_lr(pixels))
        self._validate(0, None, 0.0)
        self._update_best()
        self.rng = torch.get_rng_state()
        self.resumable = True

    def _trained(self) -> list[nn.Parameter]:
        return [p for group in parameter_groups(self.model, self.recipe, 1.0, self.train)
                for p in group["params"]]

    def _own_lr(self, pixels: Tensor) -> float:
        if self.recipe.certifies:
            return own_lr(self.pixel_model, pixels)
        if self.train != "all":
            return LR_RANGE[1]
        return auto_lr(self.model, self.source, self.batches, self.train_step.loss,
                       self.distributed)

    def _extend(self) -> None:
        """Start further epochs of a finished run, with another learning-rate schedule.

        They start from the best epoch, whose weights the finished run returned.
        """
        more = self.epochs - self.until
        plural = "s" if more > 1 else ""
        self.log_event(f"{more} more epoch{plural} after the first {self.until}: from the weights "
                       f"of epoch {self.chosen}, with another learning-rate schedule")
        self.model.load_state_dict(self.best)
        self.cycle, self.until = self.epoch, self.epochs
        self.prepare_optimizer(self.lr)

    def _train_epoch(self, interrupt: Callable[[], None]) -> None:
        begin = time.monotonic()
        most = left = 0
        for batch in self.source.epoch(self.epoch, self.number):
            pixels, labels = self.batches(batch, self.number)
            most = max(most, len(pixels))
            # BatchNorm cannot normalise a last batch of one image. In a resumable loader it is the
            # shard of a larger batch, and every process must take the step.
            if len(pixels) == 1 < most and not self.source.resumable:
                left += 1
                continue
            try:
                loss = self._step(pixels, labels)
            except ValueError as error:
                if len(pixels) > 1 or not needs_several(error):
                    raise
                left += 1  # a batch of one image came before any larger one
                continue
            if not math.isfinite(loss):
                self._go_back(self._not_finite(loss))
                return
            interrupt()
            if self.source.resumable and time.monotonic() - self.saved_at > _SAVE_EVERY:
                self.save()
        last = copied(self.model)
        try:
            self.model.load_state_dict(self.average.values)
            self._validate(self.epoch + 1, self.total_loss / max(self.number, 1),
                           time.monotonic() - begin)
            found = self._remedy()
            if found is None:
                self._update_best()
        finally:  # also if a second Ctrl-C interrupts the validation
            self.model.load_state_dict(last)
        if found is not None:
            self.history.pop()
            self._go_back(found)
            return
        if self.number + left != self.per_epoch and self.epoch == self.cycle:
            self.log_event(f"an epoch had {self.number + left} batches, but the loader's length is "
                           f"{self.per_epoch}, which the learning-rate schedule assumes")
        self.epoch, self.number, self.total_loss = self.epoch + 1, 0, 0.0
        self._advance_schedule(self.epoch * self.per_epoch)
        self.rng = torch.get_rng_state()  # the held-out images may have used random numbers, too
        self.warn()

    def _step(self, pixels: Tensor, labels: Tensor) -> float:
        """Take one step unless the loss is not finite; return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        # an epoch counts as many steps as the loader's length, even if it has more
        done = self.epoch * self.per_epoch + min(self.number, self.per_epoch - 1)
        self.train_step.objective.at(done / max(self.grown * self.per_epoch, 1))
        value = self.train_step(pixels, labels, self.parameters)
        if not math.isfinite(value):
            return value
        # each process has other images; the average gives all of them the state that is saved
        self.distributed.average(b for m in self.model.modules()
                                 if not isinstance(m, QuantActivation)
                                 for b in m.buffers(recurse=False))
        nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimizer.step()
        self._advance_schedule(done + 1)
        self.average.update(self.model)
        self.total_loss += value
        self.number += 1
        self.rng = torch.get_rng_state()
        if not self.stepped:
            self.bar.warmed_up(1)
        self.stepped = True
        note = f"epoch {self.epoch + 1}/{self.epochs}, loss {self.total_loss / self.number:.3f}"
        self.bar.advance(1, f"{note}, {self.accuracies()}" if self.accuracies() else note)
        return value

    def _advance_schedule(self, done: int) -> None:
        """Advance the learning rate to its value after so many steps of the whole run.

        An epoch counts as many steps as the loader's length. If it has more batches, the rate does
        not change any more; if it has fewer, the rate jumps at the end of the epoch.
        """
        while self.schedule.last_epoch < done - self.cycle * self.per_epoch:
            self.schedule.step()

    def _validate(self, epoch: int, loss: float | None, seconds: float) -> None:
        """Validate the model, and add the epoch to the history."""
        objective = self.train_step.objective
        attacks = self.recipe.attacks
        if isinstance(objective, CertifiedObjective):
            found = certified_validation(objective, self.source.val, self.batches)
        else:
            found = validate(self.pixel_model, self.source.some if attacks else self.source.val,
                             self.batches, self.threat, attacks, self.seed)
        clean, robust, self.validated = self.distributed.agreed(tuple(found))
        self.history.append(Epoch(epoch, loss, clean, robust, self.lr, seconds))

    def _update_best(self) -> None:
        """Make the last epoch the best one unless an earlier epoch was clearly better."""
        robust = self.history[-1].validation
        score = -1.0 if robust is None else robust
        if as_good(score, self.best_score, self.validated):
            self.best, self.chosen = copied(self.model), self.history[-1].epoch
        self.best_score = max(self.best_score, score)

    def _remedy(self) -> Remedy | None:
        """Return what went wrong in the last epoch, and what to change; None: nothing."""
        if self.retries >= RETRIES or self.source.val is None:
            return None
        last, own = self.history[-1], None
        found = collapsed(self.recipe, self.best_score, last.validation) if self.recipe.certifies \
            else None
        if found is not None:
            return found
        if one_step(self.recipe):
            own = self.distributed.agreed(accuracy_under(
                self.train_step.attacked, self.pixel_model, self.source.some or (), self.batches))
        return remedy(self.recipe, self.history[0].clean, last.clean, last.validation, own,
                      first=last.epoch == self.cycle + 1 == 1)

    def _not_finite(self, loss: float) -> Remedy:
        """Return the remedy of a loss that is NaN or infinite.

        Raises:
            DataError: the user has chosen the learning rate, or lowering it did not help.
        """
        where = f"the loss is {loss} at epoch {self.epoch + 1}, batch {self.number}"
        if self.retries >= RETRIES or self.recipe.lr is not None:
            raise DataError(where, why=f"The peak learning rate is {self.lr:.2g}.",
                            fix="Use a smaller lr (--set lr=…).")
        return Remedy(where, self.recipe, 0.2)

    def _go_back(self, found: Remedy) -> None:
        """Return to the best epoch, or to the start, and resume with the remedy's settings."""
        if found.restart:
            # a failed epoch may have a high score, which must not rule out better epochs
            self.best, self.best_score, self.chosen = (
                self.start,
                self.history[0].validation or 0.0,
                0,
            )
        self.history = [row for row in self.history if row.epoch <= self.chosen]
        self.model.load_state_dict(self.best)
        self.recipe = self.train_step.objective.recipe = found.recipe
        self.epoch = self.cycle = self.chosen
        self.number, self.total_loss = 0, 0.0
        self.retries += 1
        self.prepare_optimizer(self.lr * found.lr_factor)
        self.rng = torch.get_rng_state()
        self.log_event(f"{found.reason}: starting again from epoch {self.chosen} with "
                       f"{found.changes}")


def check_effort(epochs: int, train: str) -> None:
    """Refuse impossible settings of a fine-tune.

    Raises:
        SpecError: epochs is not a positive integer, or train is unknown.
    """
    if train not in ("all", "thresholds"):
        raise SpecError(f"train={train!r} is unknown", fix="Use all or thresholds.")
    epochs = plain(epochs)
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise SpecError(f"epochs={epochs!r} must be an integer, 1 or more")


def fit(model: nn.Module, loader: Iterable[Any], threat: Threat, recipe: Recipe, *, epochs: int,
        train: str = "all", val: Iterable[Any] | None = None,
        run_dir: str | os.PathLike[str] | None = None, seed: int = 0,
        progress: bool = True, renew: bool = False, extends: bool = True) -> History:
    """Fine-tune a model in place; its modes and ``requires_grad`` do not change.

    Args:
        renew: whether to estimate BatchNorm statistics from training images before training.
        extends: whether a run_dir of fewer epochs may be resumed.
        others: as :func:`quantguard.harden`.

    Raises:
        SpecError, DataError: as :func:`quantguard.harden`.
        Interrupted: Ctrl-C.
    """
    check_effort(epochs, train)
    if recipe.certifies:
        check_certified(threat, train)
    source = hold_out(loader, val, recipe.batch_size, seed)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    frozen_here = [] if train == "all" else [
        p for m in model.modules() if not isinstance(m, QuantActivation)
        for p in m.parameters(recurse=False)]
    directory = None if run_dir is None else Path(run_dir)
    try:
        with locked(directory), modes_restored(model), seeded(seed):
            for parameter in frozen_here:
                parameter.requires_grad_(False)
            return Trainer(model, source, threat, recipe, epochs, train, directory, seed,
                           progress, renew, extends).run()
    finally:
        order_weights(model, torch.contiguous_format)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
