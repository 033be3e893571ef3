"""A fine-tune as its run directory holds it: state, saving and resuming, and what it reports."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attacks import PixelModel
from ..core.distributed import distributed
from ..core.errors import Interrupted
from ..core.progress import Progress
from ..core.run_dir import RunDir
from ..core.runtime import environment
from ..core.specs import Threat
from ..data.train_batches import Source
from ..nn.input_quantizer import is_input
from ..nn.quant_activation import quantizers
from .certified import schedule
from .history import Epoch, History
from .model_state import copied
from .optim import AdamW, Average, merging, parameter_groups
from .pixel_batches import PixelBatches
from .recipes import Recipe
from .train_step import TrainStep
from .validation import levels_used

# Attributes that are saved besides the model, the optimizer and the random numbers.
SAVED = ("best", "chosen", "best_score", "epoch", "number", "total_loss", "retries", "cycle",
         "until", "grown", "lr", "events")


class ResumableRun:
    """State of a fine-tune, which a run directory saves and restores.

    Attributes:
        epoch, number: the present epoch, and the batches of it that are done.
        chosen, best, best_score: the best epoch so far, its weights and its validation accuracy.
        cycle, until: the epochs between which the learning rate runs through its schedule.
        grown: the epoch by which the eps of ``ibp`` has grown to its full size.
        start: the weights before training.
        retries: number of times that training has returned to an earlier epoch.
        parent_clean: the float model's accuracy on the held-out slice.
        resumable: whether there is something to save.
        stepped: whether a step has been taken.
    """

    def __init__(self, model: nn.Module, source: Source, threat: Threat, recipe: Recipe,
                 epochs: int, train: str, run_dir: Path | None, seed: int, progress: bool) -> None:
        self.model, self.source, self.threat, self.recipe = model, source, threat, recipe
        self.epochs, self.train, self.seed = epochs, train, seed
        self.pixel_model = PixelModel(model, threat)
        self.batches = PixelBatches(self.pixel_model, threat, unlabelled=recipe.distill > 0)
        self.distributed, self.per_epoch = distributed(), source.count()
        self.train_step = TrainStep(self.pixel_model, threat, recipe, train == "all",
                                    self.batches.device, self.distributed, self.log_event)
        self.bar = Progress(f"harden ({recipe.name})", epochs * self.per_epoch,
                            progress and self.distributed.is_main)
        self.history: list[Epoch] = []
        self.events: list[str] = []
        self.epoch = self.number = self.chosen = self.retries = 0
        self.cycle, self.until, self.grown = 0, epochs, epochs
        self.best_score, self.total_loss, self.lr = -1.0, 0.0, 0.0
        self.parent_clean: float | None = None
        self.resumable = self.stepped = False
        self.best = self.start = copied(model)
        self.saved_at = time.monotonic()
        self.directory = RunDir(run_dir, self._settings(run_dir is not None))

    def _settings(self, described: bool) -> dict[str, Any]:
        """Return what a run that resumes this one must have in common with it."""
        start = hashlib.blake2b(b"".join(
            v.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            for v in self.best.values()), digest_size=16).hexdigest()
        data = []
        if described:  # the labels are those of process 0's shard
            data = self.distributed.agreed([f"{k}: {v}" for k, v in
                                            self.source.described().items()])
        return {
            "threat": self.threat.to_dict(), "recipe": self.recipe.to_dict(),
            "epochs": self.epochs, "train": self.train, "seed": self.seed,
            "weights at the start": start, "data": data, "batches": self.per_epoch,
            "activations": [f"{name}: {m.spec.bits} bits, "
                            f"{'dynamic' if m.spec.dynamic else 'fixed'}"
                            for name, m in quantizers(self.model).items()],
            "tensors": sorted(f"{k} {tuple(v.shape)}" for k, v in self.best.items())}

    def prepare_optimizer(self, lr: float) -> None:
        """Make optimizer, schedule and average for the epochs from ``cycle`` to ``until``."""
        groups = parameter_groups(self.model, self.recipe, lr, self.train)
        self.lr = lr
        self.parameters = [p for group in groups for p in group["params"]]
        certifies = self.recipe.certifies
        self.optimizer = AdamW(groups, betas=(0.9, 0.999 if certifies else 0.99))
        # one more than is taken: the learning rate of the last one is 0
        steps = max((self.until - self.cycle) * self.per_epoch, 2) + 1
        self.schedule: torch.optim.lr_scheduler.LRScheduler
        if certifies:
            self.schedule = schedule(self.optimizer, steps)
        else:
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer, [group["lr"] for group in groups], total_steps=steps,
                pct_start=max(0.2, 2 / steps))  # at least one step of warm-up
        self.average = Average(self.model, self.recipe.ema or 0.0)

    def save(self) -> None:
        """Write state and metrics to the run directory, in the main process."""
        self.saved_at = time.monotonic()
        if not self.distributed.is_main:
            return
        self.directory.write({
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(), "average": self.average.values,
            "average_count": self.average.count, "history": [vars(e) for e in self.history],
            "recipe": self.recipe.to_dict(), "rng": self.rng, "parts": self.train_step.parts,
            "low": self.train_step.objective.low,
            **{name: getattr(self, name) for name in SAVED}}, *self.record({}))

    def resume(self, saved: dict[str, Any]) -> None:
        """Restore the state that a run directory holds."""
        planned = saved["settings"]["epochs"]  # older directories do not have until and grown
        for name in SAVED:
            setattr(self, name, saved.get(name, planned) if name in ("until", "grown")
                    else saved[name])
        self.train_step.parts = saved["parts"]
        self.train_step.objective.low = saved["low"]
        self.recipe = self.train_step.objective.recipe = Recipe(**saved["recipe"])
        self.prepare_optimizer(self.lr)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.average.values, self.average.count = saved["average"], saved["average_count"]
        self.history = [Epoch(**row) for row in saved["history"]]
        self.resumable = True
        self.rng = saved["rng"].cpu()
        torch.set_rng_state(self.rng)
        self.bar.skip(self.epoch * self.per_epoch + self.number)
        where = f" at epoch {self.epoch + 1}, batch {self.number}" if self.epoch < self.until \
            else ", which had finished already"
        self.bar.say(f"resumed from {self.directory.path}{where}")

    def result(self, levels: dict[str, int]) -> History:
        """Return the result of the fine-tune so far."""
        kind = torch.bfloat16 if self.train_step.objective.low else self.pixel_model.dtype
        return History(tuple(self.history), self.chosen, self.lr, levels, tuple(self.events),
                       str(kind).removeprefix("torch."))

    def record(self, levels: dict[str, int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return metrics for people to read: a row for each epoch, and facts about the run."""
        found = self.result(levels).to_dict()
        return found.pop("epochs"), {
            "recipe": self.recipe.to_dict(), "finished": self.epoch >= self.epochs, **found,
            "environment": environment(self.batches.device)}

    def log_event(self, text: str) -> None:
        """Record a problem, and show it."""
        self.events.append(text)
        self.bar.say(text)

    def accuracies(self) -> str:
        """Return the held-out accuracies of the last epoch as text; empty without any."""
        last = self.history[-1]
        if last.clean is None or last.validation is None:
            return ""
        text = f"held-out clean {last.clean:.1%}"
        if self.recipe.attacks or self.recipe.certifies:
            kind = "certified" if self.recipe.certifies else "attacked"
            text += f", {kind} {last.validation:.1%}"
        return text

    def levels(self) -> dict[str, int]:
        """Return by quantizer how many levels are in use, and log where some are not."""
        for name in merging(self.model):
            self.log_event(f"thresholds of {name} have merged: use fixed ones (--fixed), or a "
                           "lower threshold_lr")
        if self.source.some is None:
            return {}
        used = levels_used(self.pixel_model, self.source.some, self.batches)
        for name, module in quantizers(self.model).items():
            if is_input(name):
                continue  # its bits cost nothing
            every = module.spec.thresholds + 1
            if used[name] < every:
                self.bar.say(f"{name} uses {used[name]} of its {every} levels on the held-out "
                             "images: fewer bits would be enough there")
        return used

    def warn(self) -> None:
        """Warn if the first epoch is much less accurate than the float model."""
        now, parent = self.history[-1].clean, self.parent_clean
        if self.epoch == 1 and now is not None and parent is not None and now < 0.6 * parent:
            self.bar.say(f"warning: held-out clean accuracy is {now:.1%} after the first epoch, "
                         f"{parent:.1%} before: use more bits, or train longer")

    def interrupted(self) -> Interrupted:
        """Save what can be saved, and return the exception of an interrupted run."""
        self.bar.close()
        path = self.directory.path
        if path is None or not self.resumable:
            return Interrupted("interrupted; nothing was saved",
                               fix="" if path else
                               "With run_dir= (--run-dir DIR) the next run resumes where this one "
                               "stopped.")
        where = f"epoch {self.epoch + 1}, batch {self.number}"
        if self.source.resumable:
            self.save()
            return Interrupted(f"interrupted at {where}; saved in {path}",
                               fix="Run the same command again to resume.")
        return Interrupted(f"interrupted at {where}; {path} holds the end of the epoch before",
                           why="The order of this loader's batches cannot be repeated.",
                           fix="Run the same command again to resume from there.")
