"""The fine-tuning loop: adversarial training through the quantizer, probed, saved, resumed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activation import QuantActivation, staircases
from .attacks import PixelModel
from .batching import Source, hold_out
from .errors import DataError, Interrupted, SpecError
from .files import replacing
from .pooling import pools_first
from .probing import (
    LR_RANGE,
    PixelBatches,
    auto_lr,
    copied,
    levels_used,
    parent_accuracy,
    probe,
)
from .progress import Progress
from .recipes import Recipe, craft, stability_term
from .running import modes_kept, uninterrupted
from .spec import Threat

_SAVE_EVERY = 60.0


@dataclass(frozen=True)
class Epoch:
    """Hold what one epoch did: mean loss, and accuracies on the held-out slice (None: no slice)."""

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
    """

    epochs: tuple[Epoch, ...]
    chosen: int
    lr: float
    levels: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"epochs": [vars(e) for e in self.epochs], "chosen": self.chosen, "lr": self.lr,
                "levels": self.levels}


def parameter_groups(model: nn.Module, recipe: Recipe, lr: float,
                     train: str) -> list[dict[str, Any]]:
    """Return the optimizer's groups: weights, those without decay, and thresholds with steps."""
    thresholds = {id(p): p for m in staircases(model).values() for p in m.parameters(recurse=False)}
    if train == "thresholds" and not thresholds:
        raise SpecError("train='thresholds', but the model has no learnable thresholds",
                        why="Its staircases are fixed, or it has none.",
                        fix="Convert with dynamic=True, or use train='all'.")
    weights = [p for p in model.parameters()
               if p.requires_grad and id(p) not in thresholds and train == "all"]
    groups = [group for group in (
        {"params": [p for p in weights if p.dim() > 1], "lr": lr,
         "weight_decay": recipe.weight_decay},
        {"params": [p for p in weights if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
        {"params": list(thresholds.values()), "lr": recipe.threshold_lr, "weight_decay": 0.0},
    ) if group["params"]]
    if not groups:
        raise SpecError("nothing to train: every parameter is frozen",
                        fix="Set requires_grad on the parameters that may change.")
    return groups


class _Average:
    """Keep an exponential moving average of every floating tensor of a model."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.values = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.count += 1
        # a young average forgets faster: else it is the start, for 1 / (1 - decay) steps
        decay = min(self.decay, self.count / (self.count + 10)) if self.decay else 0.0
        for name, value in model.state_dict().items():
            kept = self.values[name]
            if value.is_floating_point() and decay:
                kept.lerp_(value, 1 - decay)
            else:
                kept.copy_(value)


class Trainer:
    """Hold a fine-tune under way: everything that a run directory keeps."""

    def __init__(self, model: nn.Module, source: Source, threat: Threat, recipe: Recipe,
                 epochs: int, train: str, run_dir: Path | None, seed: int, show: bool) -> None:
        self.model, self.source, self.threat, self.recipe = model, source, threat, recipe
        self.epochs, self.train, self.run_dir, self.seed = epochs, train, run_dir, seed
        self.pixel_model = PixelModel(model, threat)
        self.batches = PixelBatches(self.pixel_model, threat)
        self.per_epoch = source.count()
        self.bar = Progress(f"harden ({recipe.name})", epochs * self.per_epoch, show)
        self.history: list[Epoch] = []
        self.epoch = self.number = self.chosen = self.retries = 0
        self.best_score, self.total_loss = -1.0, 0.0
        self.parent_clean: float | None = None  # of the float model, on the held-out slice
        self.started = False
        self.best = copied(model)
        self.saved = time.monotonic()

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return the training loss of one batch: attacked images, hard forward."""
        x = craft(self.pixel_model, pixels, labels, self.threat, self.recipe)
        # what is frozen keeps its BatchNorm statistics, too
        self.model.train(self.train == "all")
        with stability_term(self.model, self.recipe.stability or 0.0) as term, \
                pools_first(self.model):
            value = F.cross_entropy(self.pixel_model(x), labels)
            return value + term()

    def run(self) -> History:
        """Train, and leave the best epoch's weights in the model."""
        start = copied(self.model)
        self.start = hashlib.blake2b(b"".join(
            v.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            for v in start.values()), digest_size=16).hexdigest()
        told = self._read()
        torch.manual_seed(self.seed)
        self.rng = torch.get_rng_state()
        parameter_groups(self.model, self.recipe, 1.0, self.train)  # raises before work is done
        try:
            with uninterrupted() as interrupt:
                self._begin(told)
                interrupt()
                while self.epoch < self.epochs:
                    self._train_epoch(interrupt)
                    if self._wrecked():
                        self._begin_again(start)
                    self._warn()
                    self._write()
                    interrupt()
                self.model.load_state_dict(self.best)
                levels = self._levels()
        except KeyboardInterrupt:
            raise self._interrupted() from None
        self.bar.note = self._said().lstrip(", ") + f", kept epoch {self.chosen}"
        self.bar.close()
        return History(tuple(self.history), self.chosen, self.lr, levels)

    def _levels(self) -> dict[str, int]:
        """Count the levels in use, and say where some are not."""
        if self.source.val is None:
            return {}
        used = levels_used(self.pixel_model, self.source.val, self.batches)
        for name, module in staircases(self.model).items():
            every = module.spec.thresholds + 1
            if used[name] < every:
                self.bar.say(f"{name} takes {used[name]} of its {every} levels on the held-out "
                             "images: fewer bits would do there")
        return used

    def _begin(self, told: dict[str, Any] | None) -> None:
        """Take up what a run directory told, or look at the model as it comes."""
        lr = told["lr"] if told else self.recipe.lr or (
            auto_lr(self.model, self.source, self.batches, self.loss) if self.train == "all"
            else LR_RANGE[1])
        self._prepare(lr)
        if told:
            self._resume(told)
            return
        self.parent_clean = parent_accuracy(self.pixel_model, self.source.val, self.batches)
        self._score(0, None, 0.0)
        self.rng = torch.get_rng_state()
        self.started = True

    def _begin_again(self, start: dict[str, Tensor]) -> None:
        """Go back to the start with a smaller learning rate."""
        clean = self.history.pop().clean
        self.model.load_state_dict(start)
        self._prepare(self.lr / 5)
        self.retries += 1
        self.bar.say(f"clean accuracy fell to {clean:.1%} in the first epoch: starting again with "
                     f"lr {self.lr:.2g}")
        self.epoch = self.chosen = 0
        # the wrecked epoch may have scored well: it must not stand in the way of better ones
        self.best, self.best_score = start, self.history[0].probe or 0.0

    def _prepare(self, lr: float) -> None:
        """Make optimizer, schedule and average for a peak learning rate."""
        groups = parameter_groups(self.model, self.recipe, lr, self.train)
        self.lr = lr
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
        steps = max(self.epochs * self.per_epoch, 2) + 1  # the last one is never taken
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, [group["lr"] for group in groups], total_steps=steps,
            pct_start=max(0.2, 2 / steps))  # one step of warm-up at least
        self.average = _Average(self.model, self.recipe.ema)

    def _train_epoch(self, interrupt: Callable[[], None]) -> None:
        begin = time.monotonic()
        for batch in self.source.epoch(self.epoch, self.number):
            self._step(*self.batches(batch, self.number))
            interrupt()
            if self.source.resumable and time.monotonic() - self.saved > _SAVE_EVERY:
                self._write()
        last = copied(self.model)
        try:
            self.model.load_state_dict(self.average.values)
            self._score(self.epoch + 1, self.total_loss / max(self.number, 1),
                        time.monotonic() - begin)
        finally:  # also where a second Ctrl-C comes in the middle of the probe
            self.model.load_state_dict(last)
        self.epoch, self.number, self.total_loss = self.epoch + 1, 0, 0.0
        self.rng = torch.get_rng_state()  # the held-out images may have drawn, too

    def _step(self, pixels: Tensor, labels: Tensor) -> None:
        loss = self.loss(pixels, labels)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DataError(f"the loss is {value} at epoch {self.epoch + 1}, batch {self.number}",
                            why=f"The peak learning rate is {self.lr:.2g}.",
                            fix="Use a smaller lr (--set lr=…).")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimizer.step()
        self.schedule.step()
        self.average.update(self.model)
        self.total_loss += value
        self.number += 1
        self.rng = torch.get_rng_state()
        self.bar.advance(1, f"epoch {self.epoch + 1}/{self.epochs}, "
                            f"loss {self.total_loss / self.number:.3f}{self._said()}")

    def _score(self, epoch: int, loss: float | None, seconds: float) -> None:
        """Probe the model, note the epoch, and keep its weights unless others were better.

        Better by more than the standard error of the best: among epochs that so few images cannot
        tell apart the latest is kept, whose learning rate was lowest.
        """
        clean, robust, images = probe(self.pixel_model, self.source.val, self.batches, self.threat,
                                      self.recipe.attacks, self.seed)
        self.history.append(Epoch(epoch, loss, clean, robust, self.lr, seconds))
        if self.run_dir is not None:
            with open(self.run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(vars(self.history[-1])) + "\n")
        score = -1.0 if robust is None else robust
        best = (max(self.best_score, 0.0) * images + 1) / (images + 2)  # 0 and 1 have errors, too
        if score >= self.best_score - math.sqrt(best * (1 - best) / (images + 2)):
            self.best, self.chosen = copied(self.model), epoch
        self.best_score = max(self.best_score, score)

    def _wrecked(self) -> bool:
        """Return whether the first epoch cost the model most of its clean accuracy."""
        before, now = self.history[0].clean, self.history[-1].clean
        return (self.epoch == 1 and self.retries < 2 and self.recipe.lr is None
                and before is not None and now is not None and now < 0.6 * before)

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
        attacked = f", attacked {last.probe:.1%}" if self.recipe.attacks else ""
        return f", held-out clean {last.clean:.1%}{attacked}"

    def _interrupted(self) -> Interrupted:
        self.bar.close()
        if self.run_dir is None or not self.started:
            return Interrupted("interrupted; nothing was kept",
                               fix="" if self.run_dir else
                               "With run_dir= (--run-dir DIR) the next run goes on from where "
                               "it stopped.")
        where = f"epoch {self.epoch + 1}, batch {self.number}"
        if self.source.resumable:
            self._write()
            return Interrupted(f"interrupted at {where}; saved in {self.run_dir}",
                               fix="Run the same command again to go on.")
        return Interrupted(f"interrupted at {where}; {self.run_dir} has the "
                           "end of the epoch before",
                           why="This loader's order is not ours to repeat.",
                           fix="Run the same command again to go on from there.")

    def _settings(self) -> dict[str, Any]:
        """Return what a run directory must agree on."""
        settings: dict[str, Any] = json.loads(json.dumps({
            "threat": self.threat.to_dict(), "recipe": self.recipe.to_dict(),
            "epochs": self.epochs, "train": self.train, "seed": self.seed, "start": self.start,
            "batches": self.per_epoch, "tensors": sorted(
                f"{k} {tuple(v.shape)}" for k, v in self.model.state_dict().items())}))
        return settings

    def _write(self) -> None:
        if self.run_dir is None:
            return
        with replacing(self.run_dir / "training.pt") as beside:
            torch.save({
                "settings": self._settings(), "lr": self.lr, "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
                "average": self.average.values, "average_count": self.average.count,
                "history": [vars(e) for e in self.history], "best": self.best,
                "chosen": self.chosen, "best_score": self.best_score, "epoch": self.epoch,
                "number": self.number, "total_loss": self.total_loss, "rng": self.rng,
                "retries": self.retries}, beside)
        self.saved = time.monotonic()

    def _read(self) -> dict[str, Any] | None:
        if self.run_dir is None:
            return None
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "training.pt"
        if not path.exists():
            return None
        told: dict[str, Any] = torch.load(path, weights_only=True,
                                          map_location=self.batches.device)
        mine = self._settings()
        different = sorted(k for k in mine if mine[k] != told["settings"].get(k))
        if different:
            raise SpecError(f"{self.run_dir} holds a run of other settings",
                            why=f"Different: {', '.join(different)}.",
                            fix="Use another run directory, or delete this one.")
        return told

    def _resume(self, told: dict[str, Any]) -> None:
        self.model.load_state_dict(told["model"])
        self.optimizer.load_state_dict(told["optimizer"])
        self.schedule.load_state_dict(told["schedule"])
        self.average.values, self.average.count = told["average"], told["average_count"]
        self.history = [Epoch(**row) for row in told["history"]]
        for name in ("best", "chosen", "best_score", "epoch", "number", "total_loss", "retries"):
            setattr(self, name, told[name])
        self.started = True
        self.rng = told["rng"].cpu()
        torch.set_rng_state(self.rng)
        self.bar.skip(self.epoch * self.per_epoch + self.number)
        self.bar.say(f"resumed from {self.run_dir} at epoch {self.epoch + 1}, batch {self.number}")


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
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
