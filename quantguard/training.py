"""The fine-tuning loop: adversarial training through the quantizer, probed, saved, resumed."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activation import QuantActivation, staircases
from .attacks import PGD, FoolboxModel, PixelModel
from .batches import check_images, check_labels, to_pixels, unpack
from .batching import Source, hold_out
from .errors import DataError, QuantguardError, SpecError
from .evaluation import image_tensor, predict
from .files import replacing
from .progress import Progress
from .recipes import Recipe, craft, stability_term
from .running import device_of, evaluating, frozen, modes_kept
from .spec import Threat

_PROBE_IMAGES = 512
_SAVE_EVERY = 60.0
# One sign step of this size may change the loss by so much to first order: what a LeNet's
# hand-tuned 2.5e-3 amounts to. Large pretrained nets get less.
_TRUST = 3.0
_LR_RANGE = (1e-5, 2.5e-3)


class Interrupted(QuantguardError, KeyboardInterrupt):
    """Ctrl-C during training; what to do to go on is in the message."""


@dataclass(frozen=True)
class Epoch:
    """Hold what one epoch did: mean loss, and accuracies on the held-out slice (None: no slice)."""

    epoch: int
    loss: float
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
    """

    epochs: tuple[Epoch, ...]
    chosen: int
    lr: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"epochs": [vars(e) for e in self.epochs], "chosen": self.chosen, "lr": self.lr}


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
    return [group for group in (
        {"params": [p for p in weights if p.dim() > 1], "lr": lr,
         "weight_decay": recipe.weight_decay},
        {"params": [p for p in weights if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
        {"params": list(thresholds.values()), "lr": recipe.threshold_lr, "weight_decay": 0.0},
    ) if group["params"]]


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
    """Fine-tune one model; see :func:`fit`."""

    def __init__(self, model: nn.Module, source: Source, threat: Threat, recipe: Recipe,
                 epochs: int, train: str, run_dir: Path | None, seed: int, show: bool) -> None:
        self.model, self.source, self.threat, self.recipe = model, source, threat, recipe
        self.epochs, self.train, self.run_dir, self.seed = epochs, train, run_dir, seed
        self.pixel_model = PixelModel(model, threat)
        self.device = device_of(model)
        self.show = show
        self.batches = source.batches or self._count()
        self.bar: Progress | None = None
        self.saved = time.monotonic()
        self.retries = 0

    def _count(self) -> int:
        count = sum(1 for _ in self.source.loader)
        if not count:
            raise DataError("the loader is empty", fix="Give at least one batch.")
        return count

    def batch(self, batch: Any, number: int) -> tuple[Tensor, Tensor]:
        """Return a batch as pixels and labels, checked."""
        where = f"batch {number} of the loader"
        inputs, labels = unpack(batch)
        if labels is None:
            raise DataError(f"{where} has no labels", fix="Yield (images, labels).")
        self.pixel_model.key, x = image_tensor(inputs, where)
        check_labels(labels, None, where)
        if len(x) != len(labels):
            raise DataError(f"{where} has {len(x)} images and {len(labels)} labels")
        pixels = to_pixels(x.to(self.device).float(), self.threat)
        check_images(pixels, self.threat.bounds, where)
        return pixels, labels.to(self.device).long()

    def train_mode(self) -> None:
        """Put the model in train mode; what is frozen keeps its statistics, too."""
        self.model.train(self.train == "all")

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return the training loss of one batch: attacked images, hard forward."""
        x = craft(self.pixel_model, pixels, labels, self.threat, self.recipe)
        with stability_term(self.model, self.recipe.stability or 0.0) as term:
            value = F.cross_entropy(self.pixel_model(x), labels)
            return value + term()

    def auto_lr(self) -> float:
        """Return a peak learning rate from the model's own scale.

        A step of AdamW moves every weight by about lr, so to first order the loss by lr times the
        gradient's L1 norm: that product is held at a constant.
        """
        norm, count = 0.0, 0
        state = copy.deepcopy(self.model.state_dict())
        self.train_mode()
        for number, batch in enumerate(self.source.epoch(0, 0)):
            pixels, labels = self.batch(batch, number)
            self._check_classes(pixels, labels)
            weights = [p for p in self.model.parameters() if p.requires_grad]
            grads = torch.autograd.grad(self.loss(pixels, labels), weights, allow_unused=True)
            norm += sum(float(g.abs().sum()) for g in grads if g is not None)
            count += 1
            if count == 4:
                break
        self.model.load_state_dict(state)
        if not math.isfinite(norm):
            raise DataError("the loss or its gradient is NaN or infinite on the first batches",
                            fix="Check the model on clean images first.")
        low, high = _LR_RANGE
        return min(max(_TRUST * count / max(norm, 1e-12), low), high)

    def _check_classes(self, pixels: Tensor, labels: Tensor) -> None:
        with evaluating(self.model):
            logits = predict(self.pixel_model, pixels[:2], 2)
        check_labels(labels, logits.shape[1], "the loader")
        self.classes = logits.shape[1]

    def probe(self) -> tuple[float | None, float | None]:
        """Return clean and attacked accuracy on the held-out slice.

        Attacked under ``sigmoid(8)`` and through the twin: the surrogate that trains would flatter
        a model that masks it.
        """
        if self.source.val is None:
            return None, None
        clean = robust = total = 0
        attacks = [PGD("margin", 10, mode="sigmoid(8)", norm=self.threat.norm, seed=self.seed)]
        if staircases(self.model):
            attacks.append(PGD("margin", 10, twin=(2, 16), norm=self.threat.norm, seed=self.seed))
        with evaluating(self.model), frozen(self.model):
            fmodel = FoolboxModel(self.pixel_model, self.threat)
            for number, batch in enumerate(self.source.val):
                x, y = self.batch(batch, number)
                with torch.no_grad():
                    alive = self.pixel_model(x).argmax(1) == y
                total += len(x)
                clean += int(alive.sum())
                if self.recipe.attacks:
                    for attack in attacks:
                        if alive.any():
                            import foolbox as fb
                            found = attack.run(fmodel, x[alive],
                                               fb.criteria.Misclassification(y[alive]),
                                               epsilon=self.threat.eps)
                            with torch.no_grad():
                                held = self.pixel_model(found).argmax(1) == y[alive]
                            alive[alive.clone()] = held
                robust += int(alive.sum())
                if total >= _PROBE_IMAGES:
                    break
        return clean / total, robust / total

    def settings(self, lr: float | None) -> dict[str, Any]:
        """Return what a run directory must agree on."""
        settings: dict[str, Any] = json.loads(json.dumps({
            "threat": self.threat.to_dict(), "recipe": self.recipe.to_dict(), "epochs": self.epochs,
            "train": self.train, "seed": self.seed, "batches": self.batches,
            "tensors": sorted(f"{k} {tuple(v.shape)}" for k, v in self.model.state_dict().items()),
        }))
        return settings

    def run(self) -> History:
        """Train, and leave the best epoch's weights in the model."""
        told = self._read()
        start = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        torch.manual_seed(self.seed)
        lr = told["lr"] if told else self.recipe.lr or (
            self.auto_lr() if self.train == "all" else _LR_RANGE[1])
        while True:
            try:
                return self._train(lr, start, told)
            except _Wrecked as wrecked:
                lr, told = lr / 5, None
                self.retries += 1
                if self.bar is not None:
                    self.bar.say(f"clean accuracy fell to {wrecked.clean:.1%} in the first epoch: "
                                 f"starting again with lr {lr:.2g}")
                self.model.load_state_dict(start)

    def _train(self, lr: float, start: dict[str, Tensor], told: dict[str, Any] | None) -> History:
        groups = parameter_groups(self.model, self.recipe, lr, self.train)
        if not groups:
            raise SpecError("nothing to train: every parameter is frozen",
                            fix="Set requires_grad on the parameters that may change.")
        rates = [group["lr"] for group in groups]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
        # one_cycle wants two steps at least
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rates, total_steps=max(self.epochs * self.batches, 2) + 1, pct_start=0.2)
        average = _Average(self.model, self.recipe.ema)
        self.bar = Progress(f"harden ({self.recipe.name})", self.epochs * self.batches, self.show)
        history: list[Epoch] = []
        best: dict[str, Tensor] = start
        chosen, best_score, first, begin_epoch, losses = 0, -1.0, 0, 0, [0.0, 0.0]
        if told is not None:
            self.model.load_state_dict(told["model"])
            optimizer.load_state_dict(told["optimizer"])
            schedule.load_state_dict(told["schedule"])
            average.values, average.count = told["average"], told["average_count"]
            history = [Epoch(**row) for row in told["history"]]
            best, chosen, best_score = told["best"], told["chosen"], told["best_score"]
            begin_epoch, first, losses = told["epoch"], told["batch"], told["losses"]
            torch.set_rng_state(told["rng"])
            self.retries = told["retries"]
            self.bar.skip(begin_epoch * self.batches + first)
            self.bar.say(f"resumed from {self.run_dir} at epoch {begin_epoch + 1}, batch {first}")
        else:
            clean, probe = self.probe()
            history.append(Epoch(0, math.nan, clean, probe, lr, 0.0))
            best_score = -1.0 if probe is None else probe
            self._log(history[-1])

        def snapshot(epoch: int, batch: int) -> None:
            self._write({"settings": self.settings(lr), "lr": lr, "model": self.model.state_dict(),
                         "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                         "average": average.values, "average_count": average.count,
                         "history": [vars(e) for e in history], "best": best, "chosen": chosen,
                         "best_score": best_score, "epoch": epoch, "batch": batch,
                         "losses": losses, "rng": torch.get_rng_state(), "retries": self.retries})

        epoch = begin_epoch
        number = first
        try:
            for epoch in range(begin_epoch, self.epochs):
                begin = time.monotonic()
                number = first
                for batch in self.source.epoch(epoch, first):
                    pixels, labels = self.batch(batch, number)
                    if number == 0 and epoch == 0:
                        self._check_classes(pixels, labels)
                    check_labels(labels, getattr(self, "classes", None), f"batch {number}")
                    self.train_mode()
                    loss = self.loss(pixels, labels)
                    value = float(loss.detach())
                    if not math.isfinite(value):
                        raise DataError(f"the loss is {value} at epoch {epoch + 1}, batch {number}",
                                        why=f"The learning rate is {lr:.2g}.",
                                        fix="Use a smaller lr (--set lr=…).")
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()  # type: ignore[no-untyped-call]
                    nn.utils.clip_grad_norm_(
                        [p for g in groups for p in g["params"]], 5.0)
                    optimizer.step()
                    schedule.step()
                    average.update(self.model)
                    losses[0] += value
                    losses[1] += 1
                    number += 1
                    self.bar.advance(1, f"epoch {epoch + 1}/{self.epochs}, "
                                        f"loss {losses[0] / losses[1]:.3f}{self._said(history)}")
                    if self.run_dir and time.monotonic() - self.saved > _SAVE_EVERY:
                        snapshot(epoch, number)
                last = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
                self.model.load_state_dict(average.values)
                clean, probe = self.probe()
                if epoch == 0 and self.retries < 2 and self.recipe.lr is None \
                        and clean is not None and (history[0].clean or 0.0) * 0.6 > clean:
                    raise _Wrecked(clean)
                history.append(Epoch(epoch + 1, losses[0] / max(losses[1], 1), clean, probe, lr,
                                     time.monotonic() - begin))
                self._log(history[-1])
                if probe is None or probe >= best_score:
                    best = {k: v.detach().clone() for k, v in average.values.items()}
                    chosen, best_score = epoch + 1, -1.0 if probe is None else probe
                self.model.load_state_dict(last)
                first, losses = 0, [0.0, 0.0]
                snapshot(epoch + 1, 0)
        except KeyboardInterrupt:
            self.bar.close()
            if self.run_dir is None:
                raise Interrupted("interrupted; nothing was kept",
                                  fix="With run_dir= (--run-dir DIR) the next run goes on from "
                                      "where it stopped.") from None
            # Batches are whole: the optimizer steps between two of them, or not at all.
            snapshot(epoch, number)
            raise Interrupted(f"interrupted at epoch {epoch + 1}, batch {number}; saved in "
                              f"{self.run_dir}",
                              fix="Run the same command again to go on.") from None
        self.model.load_state_dict(best)
        self.bar.note = self._said(history).lstrip(", ") + f", kept epoch {chosen}"
        self.bar.close()
        return History(tuple(history), chosen, lr)

    @staticmethod
    def _said(history: list[Epoch]) -> str:
        last = history[-1] if history else None
        if last is None or last.clean is None or last.probe is None:
            return ""
        return f", held-out clean {last.clean:.1%}, attacked {last.probe:.1%}"

    def _log(self, epoch: Epoch) -> None:
        if self.run_dir is not None:
            with open(self.run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(vars(epoch)) + "\n")

    def _write(self, state: dict[str, Any]) -> None:
        if self.run_dir is None:
            return
        with replacing(self.run_dir / "training.pt") as beside:
            torch.save(state, beside)
        self.saved = time.monotonic()

    def _read(self) -> dict[str, Any] | None:
        if self.run_dir is None:
            return None
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "training.pt"
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=self.device)
        state["rng"] = state["rng"].cpu()
        mine = self.settings(None)
        different = sorted(k for k in mine if mine[k] != state["settings"].get(k))
        if different:
            raise SpecError(f"{self.run_dir} holds a run of other settings",
                            why=f"Different: {', '.join(different)}.",
                            fix="Use another run directory, or delete this one.")
        return state


class _Wrecked(Exception):
    """The first epoch cost the model most of its clean accuracy."""

    def __init__(self, clean: float) -> None:
        super().__init__(clean)
        self.clean = clean


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
