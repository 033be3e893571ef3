"""The fine-tuning loop: adversarial training through the quantizer, probed, saved, resumed."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .activation import QuantActivation, bypass, staircases
from .attacks import PixelModel
from .batching import Source, hold_out
from .certifying import LR as CERTIFIED_LR
from .certifying import CertifiedObjective, certified_probe, check, schedule
from .crafting import Objective, climbs_in_bfloat16, craft, perturbed, random_start
from .entrance import is_input
from .errors import DataError, Interrupted, SpecError
from .guards import RETRIES, Remedy, collapsed, one_step, remedy
from .keeping import RunDir
from .optimizing import Average, merging, parameter_groups
from .probing import (
    LR_RANGE,
    PixelBatches,
    accuracy_under,
    auto_lr,
    copied,
    lay_out,
    levels_used,
    order_weights,
    parent_accuracy,
    probe,
)
from .progress import Progress
from .recipes import Recipe
from .running import duplicate, modes_kept, uninterrupted
from .spec import Threat
from .world import world

_SAVE_EVERY = 60.0
# What is kept of a run beside its model, optimizer and random numbers.
_KEPT = ("best", "chosen", "best_score", "epoch", "number", "total_loss", "retries", "cycle", "lr",
         "parts", "events")


@dataclass(frozen=True)
class Epoch:
    """Hold what one epoch did: mean loss, and accuracies on the held-out slice (None: no slice).

    ``probe`` is the attacked one, or what intervals certify where the recipe is ``ibp``.
    """

    epoch: int
    loss: float | None
    clean: float | None
    probe: float | None
    lr: float
    seconds: float


@dataclass(frozen=True)
class History:
    """Hold a whole fine-tune.

    Attributes:
        epochs: what each epoch did; epoch 0 is the start.
        chosen: the epoch whose weights were returned.
        lr: peak learning rate of weights.
        levels: how many of its levels each staircase took on the held-out slice, at the end.
        events: what went wrong on the way, and what was done about it.
    """

    epochs: tuple[Epoch, ...]
    chosen: int
    lr: float
    levels: dict[str, int]
    events: tuple[str, ...] = ()

    @property
    def kept(self) -> Epoch:
        """Return the epoch whose weights were returned."""
        return next(e for e in self.epochs if e.epoch == self.chosen)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"epochs": [vars(e) for e in self.epochs], "chosen": self.chosen, "lr": self.lr,
                "levels": self.levels, "events": list(self.events)}


class Trainer:
    """Hold a fine-tune under way: everything that a run directory keeps."""

    def __init__(self, model: nn.Module, source: Source, threat: Threat, recipe: Recipe,
                 epochs: int, train: str, run_dir: Path | None, seed: int, show: bool) -> None:
        self.model, self.source, self.threat, self.recipe = model, source, threat, recipe
        self.epochs, self.train, self.seed = epochs, train, seed
        self.pixel_model = PixelModel(model, threat)
        self.batches = PixelBatches(self.pixel_model, threat, unlabelled=recipe.distill > 0)
        self.low = climbs_in_bfloat16(recipe, self.batches.device) and \
            self.pixel_model.dtype != torch.float64  # who asks for digits gets them
        make = CertifiedObjective if recipe.certifies else Objective
        self.objective: Objective | CertifiedObjective = make(self.pixel_model, threat, recipe)
        if isinstance(self.objective, Objective) and recipe.distill:
            self.objective.teacher = self._teacher()
        self.per_epoch = source.count()
        self.world = world()
        self.bar = Progress(f"harden ({recipe.name})", epochs * self.per_epoch,
                            show and self.world.first)
        self.history: list[Epoch] = []
        self.events: list[str] = []
        self.epoch = self.number = self.chosen = self.retries = self.cycle = 0
        self.parts = 1  # into which a batch is cut that does not fit into memory
        self.best_score, self.total_loss, self.lr = -1.0, 0.0, 0.0
        self.parent_clean: float | None = None  # of the float model, on the held-out slice
        self.started = False
        self.best = copied(model)
        self.saved = time.monotonic()
        start = hashlib.blake2b(b"".join(
            v.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            for v in self.best.values()), digest_size=16).hexdigest()
        self.directory = RunDir(run_dir, {
            "threat": threat.to_dict(), "recipe": recipe.to_dict(), "epochs": epochs,
            "train": train, "seed": seed, "start": start, "batches": self.per_epoch,
            "tensors": sorted(f"{k} {tuple(v.shape)}" for k, v in self.best.items())})

    def _teacher(self) -> Callable[[Tensor], Tensor]:
        """Return the float parent's logits as a function of pixels."""
        parent = PixelModel(duplicate(self.model).eval().requires_grad_(False), self.threat)

        def logits(pixels: Tensor) -> Tensor:
            parent.key = self.pixel_model.key
            with torch.no_grad(), bypass(parent):
                return parent(pixels)  # type: ignore[no-any-return]
        return logits

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return this process's share of the loss of a batch: attacked images, hard forward."""
        share = len(labels) / self.world.total_of(len(labels))
        return self._objective(self._crafted(pixels, labels, self._noise(pixels)), pixels,
                               labels) * share

    def _noise(self, pixels: Tensor) -> Tensor:
        """Draw the random start of the whole batch, whichever part of it is here."""
        count = round(self.world.total_of(len(pixels)))
        return self.world.part(random_start(  # type: ignore[no-any-return]
            pixels.new_empty(count, *pixels.shape[1:]), self.threat.norm))

    def _crafted(self, pixels: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        if self.objective.teacher is not None and bool((labels < 0).any()):
            labels = torch.where(labels < 0, self.objective.teacher(pixels).argmax(1), labels)
        return craft(self.pixel_model, pixels, labels, self.objective.attacker, self.recipe, noise,
                     self.low)

    def _objective(self, x: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
        # what is frozen keeps its BatchNorm statistics, too
        self.model.train(self.train == "all")
        return self.objective(x, pixels, labels)

    def run(self) -> History:
        """Train, and leave the best epoch's weights in the model."""
        start = self.best
        told = self.directory.read(self.batches.device)
        torch.manual_seed(self.seed)
        self.rng = torch.get_rng_state()
        parameter_groups(self.model, self.recipe, 1.0, self.train)  # raises before work is done
        try:
            with uninterrupted() as interrupt:
                self.world.same(self.model)
                self._begin(told)
                interrupt()
                while self.epoch < self.epochs:
                    self._train_epoch(interrupt, start)
                    self._write()
                    interrupt()
                self.model.load_state_dict(self.best)
                levels = self._levels()
        except KeyboardInterrupt:
            raise self._interrupted() from None
        self.bar.note = self._said().lstrip(", ") + f", kept epoch {self.chosen}"
        self.bar.close()
        return History(tuple(self.history), self.chosen, self.lr, levels, tuple(self.events))

    def _levels(self) -> dict[str, int]:
        """Count the levels in use, and say where some are not."""
        for name in merging(self.model):
            self._event(f"thresholds of {name} have merged: fix them (--fixed), or lower "
                        "threshold_lr")
        if self.source.val is None:
            return {}
        used = levels_used(self.pixel_model, self.source.val, self.batches)
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
        """Take up what a run directory told, or look at the model as it comes."""
        for batch in self.source.epoch(0, 0):
            lay_out(self.pixel_model, self.batches, self.batches(batch, 0)[0])
            break
        if told:
            self._resume(told)
            return
        self._prepare(self.recipe.lr or self._own_lr())
        self.parent_clean = parent_accuracy(self.pixel_model, self.source.val, self.batches)
        self._note(0, None, 0.0)
        self._keep()
        self.rng = torch.get_rng_state()
        self.started = True

    def _own_lr(self) -> float:
        if self.recipe.certifies:
            return CERTIFIED_LR
        if self.train != "all":
            return LR_RANGE[1]
        return auto_lr(self.model, self.source, self.batches, self.loss, self.world)

    def _prepare(self, lr: float) -> None:
        """Make optimizer, schedule and average for the epochs from ``cycle`` on."""
        groups = parameter_groups(self.model, self.recipe, lr, self.train)
        self.lr = lr
        self.parameters = [p for group in groups for p in group["params"]]
        certifies = self.recipe.certifies
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999 if certifies else 0.99))
        # the last one is never taken
        steps = max((self.epochs - self.cycle) * self.per_epoch, 2) + 1
        self.schedule: torch.optim.lr_scheduler.LRScheduler
        if certifies:
            self.schedule = schedule(self.optimizer, steps)
        else:
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer, [group["lr"] for group in groups], total_steps=steps,
                pct_start=max(0.2, 2 / steps))  # one step of warm-up at least
        self.average = Average(self.model, self.recipe.ema or 0.0)

    def _train_epoch(self, interrupt: Callable[[], None], start: dict[str, Tensor]) -> None:
        begin = time.monotonic()
        for batch in self.source.epoch(self.epoch, self.number):
            loss = self._step(*self.batches(batch, self.number))
            if not math.isfinite(loss):
                self._go_back(start, self._not_finite(loss))
                return
            interrupt()
            if self.source.resumable and time.monotonic() - self.saved > _SAVE_EVERY:
                self._write()
        # each process has seen other images
        self.world.average([*self.model.buffers(), *self.average.values.values()])
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
            self._go_back(start, found)
            return
        self.epoch, self.number, self.total_loss = self.epoch + 1, 0, 0.0
        self.rng = torch.get_rng_state()  # the held-out images may have drawn, too
        self._warn()

    def _step(self, pixels: Tensor, labels: Tensor) -> float:
        """Take one step, and return the loss; where that is not finite, take none."""
        self.optimizer.zero_grad(set_to_none=True)
        done = self.epoch * self.per_epoch + self.number
        self.objective.at(done / max(self.epochs * self.per_epoch, 1))
        value = self._gradients(pixels, labels)
        if not math.isfinite(value):
            return value
        nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimizer.step()
        self.schedule.step()
        self.average.update(self.model)
        self.total_loss += value
        self.number += 1
        self.rng = torch.get_rng_state()
        self.bar.advance(1, f"epoch {self.epoch + 1}/{self.epochs}, "
                            f"loss {self.total_loss / self.number:.3f}{self._said()}")
        return value

    def _gradients(self, pixels: Tensor, labels: Tensor) -> float:
        """Leave the gradient of a batch in the parameters, and return its loss.

        A batch that does not fit into memory is cut into parts, whose gradients add up.
        """
        noise = self._noise(pixels) if self.recipe.attacks else pixels
        count = self.world.total_of(len(labels))
        while True:
            rng = torch.get_rng_state()
            try:
                value = 0.0
                for x, y, start in zip(*(v.tensor_split(self.parts)
                                         for v in (pixels, labels, noise)), strict=True):
                    value += self._part(x, y, start, len(y) / count)
                self.world.add_gradients(self.parameters)
                return self.world.total_of(value)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if 2 * self.parts > len(labels):
                    raise DataError("out of memory, even with one image at a time",
                                    fix="Use a smaller model or image, or another device.",
                                    ) from None
            self.parts *= 2
            self.optimizer.zero_grad(set_to_none=True)
            torch.set_rng_state(rng)
            if self.batches.device.type == "cuda":
                torch.cuda.empty_cache()
            self._event(f"out of memory: batches of {len(labels)} go through in {self.parts} parts "
                        "from here on, their gradients added")

    def _part(self, pixels: Tensor, labels: Tensor, noise: Tensor, share: float) -> float:
        x = self._crafted(pixels, labels, noise)
        with perturbed(self.model, self.recipe.awp, lambda: self.objective(x, pixels, labels)):
            loss = self._objective(x, pixels, labels) * share
            value = float(loss.detach())
            if math.isfinite(value):
                loss.backward()  # type: ignore[no-untyped-call]
        return value

    def _note(self, epoch: int, loss: float | None, seconds: float) -> None:
        """Probe the model, and note the epoch."""
        found = certified_probe(self.objective, self.source.val, self.batches) \
            if isinstance(self.objective, CertifiedObjective) else probe(
                self.pixel_model, self.source.val, self.batches, self.threat, self.recipe.attacks,
                self.seed)
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
            own = self.world.agreed(accuracy_under(self._crafted, self.pixel_model,
                                                   self.source.val, self.batches))
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

    def _go_back(self, start: dict[str, Tensor], found: Remedy) -> None:
        """Go back to the best epoch, or to the start, and go on from there with other settings."""
        if found.restart:
            # the wrecked epoch may have scored well: it must not stand in the way of better ones
            self.best, self.best_score, self.chosen = start, self.history[0].probe or 0.0, 0
        self.history = [row for row in self.history if row.epoch <= self.chosen]
        self.model.load_state_dict(self.best)
        self.recipe = self.objective.recipe = found.recipe
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
            "recipe": self.recipe.to_dict(), "rng": self.rng,
            **{name: getattr(self, name) for name in _KEPT}}, [vars(e) for e in self.history])

    def _resume(self, told: dict[str, Any]) -> None:
        for name in _KEPT:
            setattr(self, name, told[name])
        self.recipe = self.objective.recipe = Recipe(**told["recipe"])
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
        where = f"at epoch {self.epoch + 1}, batch {self.number}" if self.epoch < self.epochs \
            else "where it had finished already"
        self.bar.say(f"resumed from {self.directory.path} {where}")


def _out_of_memory(error: BaseException) -> bool:
    """Return whether there was no memory: CUDA says so by a type of its own, the CPU in words."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or \
        "can't allocate memory" in str(error) or "not enough memory" in str(error)


def fit(model: nn.Module, loader: Iterable[Any], threat: Threat, recipe: Recipe, *, epochs: int,
        train: str = "all", val: Iterable[Any] | None = None,
        run_dir: str | os.PathLike[str] | None = None, seed: int = 0,
        progress: bool = True) -> History:
    """Fine-tune model in place; its modes and ``requires_grad`` are put back.

    Raises:
        SpecError, DataError: as :func:`quantguard.harden`.
        Interrupted: Ctrl-C.
    """
    if train not in ("all", "thresholds"):
        raise SpecError(f"train={train!r} is unknown", fix="Use all or thresholds.")
    if not isinstance(epochs, int) or epochs < 1:
        raise SpecError(f"epochs={epochs!r} must be an integer, 1 or more")
    if recipe.certifies:
        check(threat, train)
    source = hold_out(loader, val, recipe.batch_size, seed)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    frozen_here = [] if train == "all" else [
        p for m in model.modules() if not isinstance(m, QuantActivation)
        for p in m.parameters(recurse=False)]
    directory = None if run_dir is None else Path(run_dir)
    try:
        with modes_kept(model), torch.random.fork_rng():
            for parameter in frozen_here:
                parameter.requires_grad_(False)
            return Trainer(model, source, threat, recipe, epochs, train, directory, seed,
                           progress).run()
    finally:
        order_weights(model, torch.contiguous_format)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
