"""The fine-tuning loop: adversarial training through the quantizer, probed, saved, resumed."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .activation import QuantActivation, staircases
from .attacks import PixelModel
from .batching import Source, hold_out
from .certifying import CertifiedObjective, certified_probe, check, own_lr, schedule
from .entrance import is_input
from .errors import DataError, Interrupted, SpecError
from .gradients import Gradients, needs_several
from .guards import RETRIES, Remedy, collapsed, one_step, remedy
from .held import has_labels
from .history import Epoch, History
from .keeping import RunDir, locked
from .layout import order_weights, takes_channels_last
from .optimizing import AdamW, Average, merging, parameter_groups
from .probing import (
    LR_RANGE,
    PixelBatches,
    accuracy_under,
    auto_lr,
    copied,
    levels_used,
    of_several,
    parent_accuracy,
    probe,
    reestimate,
)
from .progress import Progress
from .recipes import Recipe
from .running import environment, modes_kept, seeded, true_float32, uninterrupted
from .spec import Threat, plain
from .world import world

_SAVE_EVERY = 60.0
# What is kept of a run beside its model, optimizer and random numbers.
_KEPT = ("best", "chosen", "best_score", "epoch", "number", "total_loss", "retries", "cycle",
         "until", "grown", "lr", "events")


class Trainer:
    """Hold a fine-tune under way: everything that a run directory keeps."""

    def __init__(self, model: nn.Module, source: Source, threat: Threat, recipe: Recipe,
                 epochs: int, train: str, run_dir: Path | None, seed: int, show: bool,
                 renew: bool, extends: bool) -> None:
        self.model, self.source, self.threat, self.recipe = model, source, threat, recipe
        self.epochs, self.train, self.seed, self.renew = epochs, train, seed, renew
        self.extends = extends
        self.pixel_model = PixelModel(model, threat)
        self.batches = PixelBatches(self.pixel_model, threat, unlabelled=recipe.distill > 0)
        self.world, self.per_epoch = world(), source.count()
        self.gradients = Gradients(self.pixel_model, threat, recipe, train == "all",
                                   self.batches.device, self.world, self._event)
        self.bar = Progress(f"harden ({recipe.name})", epochs * self.per_epoch,
                            show and self.world.first)
        self.history: list[Epoch] = []
        self.events: list[str] = []
        self.epoch = self.number = self.chosen = self.retries = 0
        # The learning rate's course goes from the start of one epoch to the end of another.
        self.cycle, self.until = 0, epochs
        self.grown = epochs  # the end of the first one, where ibp's eps has grown
        self.best_score, self.total_loss, self.lr = -1.0, 0.0, 0.0
        self.parent_clean: float | None = None  # of the float model, on the held-out slice
        self.started = self.stepped = False
        self.best = self.start = copied(model)
        self.saved = time.monotonic()
        start = hashlib.blake2b(b"".join(
            v.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            for v in self.best.values()), digest_size=16).hexdigest()
        data = [] if run_dir is None else self.world.agreed(  # the labels are of process 0's part
            [f"{k}: {v}" for k, v in source.described().items()])
        self.directory = RunDir(run_dir, {
            "threat": threat.to_dict(), "recipe": recipe.to_dict(), "epochs": epochs,
            "train": train, "seed": seed, "weights at the start": start, "data": data,
            "batches": self.per_epoch,
            "activations": [f"{name}: {m.spec.bits} bits, "
                            f"{'dynamic' if m.spec.dynamic else 'fixed'}"
                            for name, m in staircases(model).items()],
            "tensors": sorted(f"{k} {tuple(v.shape)}" for k, v in self.best.items())})

    def run(self) -> History:
        """Train, and leave the best epoch's weights in the model."""
        told = self.directory.read(self.batches.device, "epochs" if self.extends else None)
        torch.manual_seed(self.seed)
        self.rng = torch.get_rng_state()
        parameter_groups(self.model, self.recipe, 1.0, self.train)  # raises before work is done
        try:
            with uninterrupted() as interrupt, self._digits():
                self.world.same(self.model)
                self._begin(told)
                interrupt()
                while self.epoch < self.epochs:
                    if self.epoch == self.until:
                        self._extend()
                    self._train_epoch(interrupt)
                    self._write()
                    interrupt()
                self.model.load_state_dict(self.best)
                levels = self._levels()
        except KeyboardInterrupt:
            raise self._interrupted() from None
        self.bar.note = self._said().lstrip(", ") + f", kept epoch {self.chosen}"
        self.bar.close()
        if self.world.first:
            self.directory.tell(*self._record(levels))
        return self._history(levels)

    def _history(self, levels: dict[str, int]) -> History:
        kind = torch.bfloat16 if self.gradients.objective.low else self.pixel_model.dtype
        return History(tuple(self.history), self.chosen, self.lr, levels, tuple(self.events),
                       str(kind).removeprefix("torch."))

    def _record(self, levels: dict[str, int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return what people read of a run: a row for each epoch, and what is true of them all."""
        found = self._history(levels).to_dict()
        return found.pop("epochs"), {
            "recipe": self.recipe.to_dict(), "finished": self.epoch >= self.epochs, **found,
            "environment": environment(self.batches.device)}

    def _digits(self) -> AbstractContextManager[Any]:
        """Return how float32 is multiplied: intervals that TF32 has rounded train much worse."""
        return true_float32() if self.recipe.certifies else nullcontext()

    def _levels(self) -> dict[str, int]:
        """Count the levels in use, and say where some are not."""
        for name in merging(self.model):
            self._event(f"thresholds of {name} have merged: fix them (--fixed), or lower "
                        "threshold_lr")
        if self.source.some is None:
            return {}
        used = levels_used(self.pixel_model, self.source.some, self.batches)
        for name, module in staircases(self.model).items():
            if is_input(name):
                continue  # its bits cost nothing
            every = module.spec.thresholds + 1
            if used[name] < every:
                self.bar.say(f"{name} takes {used[name]} of its {every} levels on the held-out "
                             "images: fewer bits would do there")
        return used

    def _event(self, text: str) -> None:
        self.events.append(text)
        self.bar.say(text)

    def _begin(self, told: dict[str, Any] | None) -> None:
        """Take up what a run directory told, or look at the model as it comes.

        Its float parent keeps the statistics that it came with.
        """
        read = (self.batches(batch, 0) for batch in self.source.epoch(0, 0))
        for first, labels in of_several(read, lambda batch: len(batch[0])):
            pixels = first[:2]
            if takes_channels_last(self.pixel_model, pixels):
                order_weights(self.pixel_model, torch.channels_last)
            self.gradients.look(pixels)
            if not told:
                self.gradients.check(first, labels, self._trained())
            break
        if self.recipe.distill and self.source.val is not None \
                and not has_labels(self.source.val):
            self.source.val = self.source.some = None
            self._event("no held-out image has a label: no probe picks the best epoch. Pass val= "
                        "with labels to have one")
        if not told:
            self.parent_clean = parent_accuracy(self.pixel_model, self.source.val, self.batches)
        if self.renew:
            reestimate(self.pixel_model, (self.batches(batch, number)[0] for number, batch
                                          in enumerate(self.source.epoch(0, 0))))
            self.world.average([*self.model.buffers()])
            self.best = self.start = copied(self.model)
        if told:
            self._resume(told)
            return
        self._prepare(self.recipe.lr or self._own_lr(pixels))
        self._note(0, None, 0.0)
        self._keep()
        self.rng = torch.get_rng_state()
        self.started = True

    def _trained(self) -> list[nn.Parameter]:
        return [p for group in parameter_groups(self.model, self.recipe, 1.0, self.train)
                for p in group["params"]]

    def _own_lr(self, pixels: Tensor) -> float:
        if self.recipe.certifies:
            return own_lr(self.pixel_model, pixels)
        if self.train != "all":
            return LR_RANGE[1]
        return auto_lr(self.model, self.source, self.batches, self.gradients.loss, self.world)

    def _prepare(self, lr: float) -> None:
        """Make optimizer, schedule and average for the epochs from ``cycle`` on."""
        groups = parameter_groups(self.model, self.recipe, lr, self.train)
        self.lr = lr
        self.parameters = [p for group in groups for p in group["params"]]
        certifies = self.recipe.certifies
        self.optimizer = AdamW(groups, betas=(0.9, 0.999 if certifies else 0.99))
        # the last one is never taken
        steps = max((self.until - self.cycle) * self.per_epoch, 2) + 1
        self.schedule: torch.optim.lr_scheduler.LRScheduler
        if certifies:
            self.schedule = schedule(self.optimizer, steps)
        else:
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer, [group["lr"] for group in groups], total_steps=steps,
                pct_start=max(0.2, 2 / steps))  # one step of warm-up at least
        self.average = Average(self.model, self.recipe.ema or 0.0)

    def _extend(self) -> None:
        """Begin further epochs than were asked at first: another course of the learning rate.

        From the epoch that was best, whose weights a run without them has returned.
        """
        more = self.epochs - self.until
        self._event(f"{more} more epoch{'s' * (more > 1)} after the {self.until} that were asked "
                    f"before: from the weights of epoch {self.chosen}, with another course of the "
                    "learning rate")
        self.model.load_state_dict(self.best)
        self.cycle, self.until = self.epoch, self.epochs
        self._prepare(self.lr)

    def _train_epoch(self, interrupt: Callable[[], None]) -> None:
        begin = time.monotonic()
        most = left = 0
        for batch in self.source.epoch(self.epoch, self.number):
            pixels, labels = self.batches(batch, self.number)
            most = max(most, len(pixels))
            # the rest of a loader that is not ours has no variance for BatchNorm; of our own
            # batches every process takes its part, and its step
            if len(pixels) == 1 < most and not self.source.resumable:
                left += 1
                continue
            try:
                loss = self._step(pixels, labels)
            except ValueError as error:
                if len(pixels) > 1 or not needs_several(error):
                    raise
                left += 1  # it came before any larger one
                continue
            if not math.isfinite(loss):
                self._go_back(self._not_finite(loss))
                return
            interrupt()
            if self.source.resumable and time.monotonic() - self.saved > _SAVE_EVERY:
                self._write()
        last = copied(self.model)
        try:
            self.model.load_state_dict(self.average.values)
            self._note(self.epoch + 1, self.total_loss / max(self.number, 1),
                       time.monotonic() - begin)
            found = self._remedy()
            if found is None:
                self._keep()
        finally:  # also where a second Ctrl-C comes in the middle of the probe
            self.model.load_state_dict(last)
        if found is not None:
            self.history.pop()
            self._go_back(found)
            return
        if self.number + left != self.per_epoch and self.epoch == self.cycle:
            self._event(f"an epoch had {self.number + left} batches, and the loader says that it "
                        f"has {self.per_epoch}: the learning rate falls as for these")
        self.epoch, self.number, self.total_loss = self.epoch + 1, 0, 0.0
        self._lower(self.epoch * self.per_epoch)
        self.rng = torch.get_rng_state()  # the held-out images may have drawn, too
        self._warn()

    def _step(self, pixels: Tensor, labels: Tensor) -> float:
        """Take one step, and return the loss; where that is not finite, take none."""
        self.optimizer.zero_grad(set_to_none=True)
        # an epoch counts as many steps as the loader says that it has batches
        done = self.epoch * self.per_epoch + min(self.number, self.per_epoch - 1)
        self.gradients.objective.at(done / max(self.grown * self.per_epoch, 1))
        value = self.gradients(pixels, labels, self.parameters)
        if not math.isfinite(value):
            return value
        # each process has seen other images; so all have one state, which process 0 can write
        self.world.average(b for m in self.model.modules() if not isinstance(m, QuantActivation)
                           for b in m.buffers(recurse=False))
        nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimizer.step()
        self._lower(done + 1)
        self.average.update(self.model)
        self.total_loss += value
        self.number += 1
        self.rng = torch.get_rng_state()
        if not self.stepped:
            self.bar.warmed_up(1)
        self.stepped = True
        self.bar.advance(1, f"epoch {self.epoch + 1}/{self.epochs}, "
                            f"loss {self.total_loss / self.number:.3f}{self._said()}")
        return value

    def _lower(self, done: int) -> None:
        """Take the learning rate to where it is after so many steps of all.

        An epoch has as many as the loader said; one that has more stays at its end, and one that
        has fewer goes there at last.
        """
        while self.schedule.last_epoch < done - self.cycle * self.per_epoch:
            self.schedule.step()

    def _note(self, epoch: int, loss: float | None, seconds: float) -> None:
        """Probe the model, and note the epoch."""
        objective = self.gradients.objective
        attacks = self.recipe.attacks
        found = certified_probe(objective, self.source.val, self.batches) \
            if isinstance(objective, CertifiedObjective) else probe(
                self.pixel_model, self.source.some if attacks else self.source.val, self.batches,
                self.threat, attacks, self.seed)
        clean, robust, self.probed = self.world.agreed(tuple(found))
        self.history.append(Epoch(epoch, loss, clean, robust, self.lr, seconds))

    def _keep(self) -> None:
        """Keep the model's weights unless an earlier epoch was better.

        Better by more than the standard error of the best: among epochs that so few images cannot
        tell apart the latest is kept, whose learning rate was lowest.
        """
        robust, images = self.history[-1].probe, self.probed
        score = -1.0 if robust is None else robust
        best = (max(self.best_score, 0.0) * images + 1) / (images + 2)  # 0 and 1 have errors, too
        if score >= self.best_score - math.sqrt(best * (1 - best) / (images + 2)):
            self.best, self.chosen = copied(self.model), self.history[-1].epoch
        self.best_score = max(self.best_score, score)

    def _remedy(self) -> Remedy | None:
        """Return what is wrong with the epoch that was noted last, and what to do about it."""
        if self.retries >= RETRIES or self.source.val is None:
            return None
        last, own = self.history[-1], None
        found = collapsed(self.recipe, self.best_score, last.probe) if self.recipe.certifies \
            else None
        if found is not None:
            return found
        if one_step(self.recipe):
            own = self.world.agreed(accuracy_under(
                self.gradients.crafted, self.pixel_model, self.source.some or (), self.batches))
        return remedy(self.recipe, self.history[0].clean, last.clean, last.probe, own,
                      first=last.epoch == self.cycle + 1 == 1)

    def _not_finite(self, loss: float) -> Remedy:
        """Return the remedy of a loss that is NaN or infinite.

        Raises:
            DataError: it has been tried, or the first batches are at fault.
        """
        where = f"the loss is {loss} at epoch {self.epoch + 1}, batch {self.number}"
        if self.retries >= RETRIES or self.recipe.lr is not None:
            raise DataError(where, why=f"The peak learning rate is {self.lr:.2g}.",
                            fix="Use a smaller lr (--set lr=…).")
        return Remedy(where, self.recipe, 0.2)

    def _go_back(self, found: Remedy) -> None:
        """Go back to the best epoch, or to the start, and go on from there with other settings."""
        if found.restart:
            # the wrecked epoch may have scored well: it must not stand in the way of better ones
            self.best, self.best_score, self.chosen = self.start, self.history[0].probe or 0.0, 0
        self.history = [row for row in self.history if row.epoch <= self.chosen]
        self.model.load_state_dict(self.best)
        self.recipe = self.gradients.objective.recipe = found.recipe
        self.epoch = self.cycle = self.chosen
        self.number, self.total_loss = 0, 0.0
        self.retries += 1
        self._prepare(self.lr * found.lr_factor)
        self.rng = torch.get_rng_state()
        self._event(f"{found.reason}: starting again from epoch {self.chosen} with {found.said}")

    def _warn(self) -> None:
        """Say so where the first epoch leaves far less than the float model had."""
        now, parent = self.history[-1].clean, self.parent_clean
        if self.epoch == 1 and now is not None and parent is not None and now < 0.6 * parent:
            self.bar.say(f"warning: held-out clean accuracy is {now:.1%} after the first epoch, "
                         f"{parent:.1%} before: use more bits, or train longer")

    def _said(self) -> str:
        last = self.history[-1]
        if last.clean is None or last.probe is None:
            return ""
        kind = "certified" if self.recipe.certifies else "attacked"
        probed = self.recipe.attacks or self.recipe.certifies
        return f", held-out clean {last.clean:.1%}" + f", {kind} {last.probe:.1%}" * probed

    def _interrupted(self) -> Interrupted:
        self.bar.close()
        path = self.directory.path
        if path is None or not self.started:
            return Interrupted("interrupted; nothing was kept",
                               fix="" if path else
                               "With run_dir= (--run-dir DIR) the next run goes on from where "
                               "it stopped.")
        where = f"epoch {self.epoch + 1}, batch {self.number}"
        if self.source.resumable:
            self._write()
            return Interrupted(f"interrupted at {where}; saved in {path}",
                               fix="Run the same command again to go on.")
        return Interrupted(f"interrupted at {where}; {path} has the end of the epoch before",
                           why="This loader's order is not ours to repeat.",
                           fix="Run the same command again to go on from there.")

    def _write(self) -> None:
        self.saved = time.monotonic()
        if not self.world.first:
            return
        self.directory.write({
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(), "average": self.average.values,
            "average_count": self.average.count, "history": [vars(e) for e in self.history],
            "recipe": self.recipe.to_dict(), "rng": self.rng, "parts": self.gradients.parts,
            "low": self.gradients.objective.low,
            **{name: getattr(self, name) for name in _KEPT}}, *self._record({}))

    def _resume(self, told: dict[str, Any]) -> None:
        asked = told["settings"]["epochs"]  # of a run whose directory knew of no further ones
        for name in _KEPT:
            setattr(self, name, told.get(name, asked) if name in ("until", "grown")
                    else told[name])
        self.gradients.parts = told["parts"]
        self.gradients.objective.low = told["low"]  # auto may choose otherwise another time
        self.recipe = self.gradients.objective.recipe = Recipe(**told["recipe"])
        self._prepare(self.lr)
        self.model.load_state_dict(told["model"])
        self.optimizer.load_state_dict(told["optimizer"])
        self.schedule.load_state_dict(told["schedule"])
        self.average.values, self.average.count = told["average"], told["average_count"]
        self.history = [Epoch(**row) for row in told["history"]]
        self.started = True
        self.rng = told["rng"].cpu()
        torch.set_rng_state(self.rng)
        self.bar.skip(self.epoch * self.per_epoch + self.number)
        where = f"at epoch {self.epoch + 1}, batch {self.number}" if self.epoch < self.until \
            else "where it had finished already"
        self.bar.say(f"resumed from {self.directory.path} {where}")


def check_effort(epochs: int, train: str) -> None:
    """Refuse what no fine-tune can be told to do.

    Raises:
        SpecError: epochs that are no number of passes, or an unknown part of the model.
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
    """Fine-tune model in place; its modes and ``requires_grad`` are put back.

    Args:
        renew: estimate BatchNorm statistics anew at first, from training images.
        extends: whether a run_dir of fewer epochs is gone on from.
        others: as :func:`quantguard.harden`.

    Raises:
        SpecError, DataError: as :func:`quantguard.harden`.
        Interrupted: Ctrl-C.
    """
    check_effort(epochs, train)
    if recipe.certifies:
        check(threat, train)
    source = hold_out(loader, val, recipe.batch_size, seed)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    frozen_here = [] if train == "all" else [
        p for m in model.modules() if not isinstance(m, QuantActivation)
        for p in m.parameters(recurse=False)]
    directory = None if run_dir is None else Path(run_dir)
    try:
        with locked(directory), modes_kept(model), seeded(seed):
            for parameter in frozen_here:
                parameter.requires_grad_(False)
            return Trainer(model, source, threat, recipe, epochs, train, directory, seed,
                           progress, renew, extends).run()
    finally:
        order_weights(model, torch.contiguous_format)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
