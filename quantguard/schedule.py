"""Run a suite on images: the fallen are not attacked again, and what is done is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import masking
from .attacks import Entry, FoolboxModel, PixelModel, Substitute, Suite
from .attacks.losses import fools, margin, project
from .budget import Budget
from .errors import SpecError
from .evidence import padded
from .files import indices, mask_of, replacing
from .images import Images
from .keeping import arrays
from .progress import Progress
from .results import AttackResult
from .spec import Threat
from .world import world

# They take next to no time, and what there is of it goes into first calls: no measure of the rest.
_WARMING = ("noise", "fgsm")
# Ends the label of a reseeded attack that is run once more, on what it has not been tried on.
OTHERS = ", the others"
# What a run directory's settings are called where they differ.
_SAID = {"predictions": "what the model answers", "suite": "the attacks",
         "images": "the images", "certified": "what is proven"}
# The share of a budget that is kept for what sees no gradient: on staircases other attacks break
# more.
_KEPT = 0.25
# Survivors that are enough to see whether another seed would break more.
_RESEEDED = 64
# Survivors that are searched with many queries, those nearest to the boundary.
_NEAREST = 48


class State:
    """Hold an evaluation under way; a run directory keeps it after every attack."""

    def __init__(self, path: Path | None, settings: dict[str, Any], images: Images,
                 correct: np.ndarray) -> None:
        self.path, self.settings = path, settings
        self.survived = correct.copy()
        self.results: list[AttackResult] = []
        self.ended = 0.0  # the budget of a run that came to its end, in seconds
        # What broke an image; of one that stands, what came nearest.
        self.adversarials = images.pixels.cpu().numpy().copy()
        self.margins = np.full(len(correct), -np.inf)
        if path is not None and path.exists():
            self._read(path, len(correct))

    def _read(self, path: Path, n: int) -> None:
        state, adversarials, margins = arrays(path, "state", "adversarials", "margins")
        told = json.loads(str(state))
        different = sorted(k for k in {*told["settings"], *self.settings}
                           if told["settings"].get(k) != self.settings.get(k))
        if different:
            raise SpecError(f"{path.parent} holds an evaluation of other settings",
                            why=f"Different: {', '.join(_SAID.get(k, k) for k in different)}.",
                            fix="Use another run directory, or delete this one.")
        self.adversarials, self.margins = adversarials, margins
        self.ended = told.get("ended", 0.0)
        for row in told["results"]:
            row |= {k: mask_of(row[k], n) for k in ("attacked", "broke")}
            self.results.append(AttackResult(**row))
            self.survived &= ~self.results[-1].broke

    def add(self, result: AttackResult) -> None:
        self.results.append(result)
        self.survived &= ~result.broke
        self._save()

    def end(self, limit: float) -> None:
        """Note that within this budget nothing more fits."""
        self.ended = max(self.ended, limit)
        self._save()

    def _save(self) -> None:
        if self.path is None or not world().first:
            return
        rows = [{**vars(r), "attacked": indices(r.attacked), "broke": indices(r.broke)}
                for r in self.results]
        with replacing(self.path) as beside:
            np.savez(beside, adversarials=self.adversarials, margins=self.margins,
                     state=json.dumps({"settings": self.settings, "results": rows,
                                       "ended": self.ended}))


class Schedule:
    """Run what is not done yet, one attack after the other, within a budget of time.

    Args:
        model, data, threat, correct: what is attacked; correct (N,) bool.
        certified: (N,) images that no attack can break: only those that attack all images try.
        batch: the one size of all batches.
        state: what is done already.
        bar: shows progress.
        budget: the time that there is; labels of what does not fit are noted in it.
        replay: the attacks that another evaluation ran, by label, and whether on all correct
            images: those run, no others.
        forgiving: whether an attack that raises is a row like the others; else its error is ours.
    """

    def __init__(self, model: PixelModel, data: Images, threat: Threat, batch: int,
                 correct: np.ndarray, certified: np.ndarray, state: State, bar: Progress,
                 budget: Budget, replay: Mapping[str, bool] | None = None,
                 forgiving: bool = False) -> None:
        self.model, self.data, self.threat, self.batch = model, data, threat, batch
        self.correct, self.certified, self.state, self.bar = correct, certified, state, bar
        self.replay = replay
        self.budget, self.forgiving = budget, forgiving
        budget.spend(sum(result.seconds for result in state.results))
        self._number = 0
        self._work = self._seconds = 0.0  # of the attacks that ran: how fast this machine is

    @property
    def standing(self) -> np.ndarray:
        """Return (N,) the images that stand and might fall."""
        mask: np.ndarray = self.state.survived & ~self.certified
        return mask

    def run(self, suite: Suite) -> None:
        """Run the suite; what sees no gradient comes last, and its time is kept for it."""
        last = [*suite.reseeded, *suite.blind]
        for entry in suite.entries:
            self._one(entry, reserved=suite.blind)
        self._escalate(suite, last)
        few = self.standing.copy()
        few[np.flatnonzero(few)[_RESEEDED:]] = False
        again = [self._one(entry, few, reserved=suite.blind) for entry in suite.reseeded]
        pays = any(result is not None and result.broke.any() for result in again)
        if pays and bool((self.standing & ~few).any()):
            for entry in suite.reseeded:  # what broke some of the few breaks some of the others
                self.bar.extend(entry.cost * int(self.correct.sum()))
                self._one(replace(entry, label=entry.label + OTHERS, group="twin"),
                          self.standing & ~few, reserved=suite.blind)
        for entry in suite.blind:
            self._one(entry)
        for entry in suite.searches:
            self.bar.extend(entry.cost * int(self.correct.sum()))
            self._one(entry, self._nearest())
        if self.budget.limit is not None:
            self.state.end(self.budget.limit)

    def _nearest(self) -> np.ndarray:
        """Return (N,) the survivors whose best adversarials came nearest to the boundary."""
        mask, rows = np.zeros_like(self.correct), np.flatnonzero(self.standing)
        order = np.argsort(-self.state.margins[rows], kind="stable")
        mask[rows[order[:_NEAREST]]] = True
        return mask

    def _one(self, entry: Entry, mask: np.ndarray | None = None,
             reserved: Sequence[Entry] | None = None) -> AttackResult | None:
        """Run the next attack, or take what a run directory holds of it; None: left out.

        Args:
            entry: the attack.
            mask: (N,) the images; None: those that stand, or all correct ones.
            reserved: what should have time afterwards; None: this is what time was kept for.
        """
        state, every = self.state, int(self.correct.sum())
        if self._number < len(state.results):
            if state.results[self._number].label != entry.label:  # left out by the run before
                self._left_out(entry)
                return None
            self.bar.skip(entry.cost * every)
            self._number += 1
            self._count(entry, state.results[self._number - 1])
            return state.results[self._number - 1]
        if mask is None and entry.everywhere and self.replay is None \
                and self._wanted(entry, every, reserved):
            mask = self.correct
        elif mask is None:  # no time for a figure of its own, but perhaps for what stands
            everywhere = entry.everywhere and (self.replay or {}).get(entry.label, False)
            entry = replace(entry, everywhere=everywhere)
            mask = self.correct if everywhere else self.standing
        if not self._wanted(entry, int(mask.sum()), reserved):
            self._left_out(entry)
            return None
        result = _attack(FoolboxModel(self.model, self.threat), entry, self.data, self.threat,
                         self.batch, mask, state, self.bar, self.forgiving)
        self.bar.skip(entry.cost * (every - int(result.attacked.sum())))
        state.add(result)
        self._count(entry, result)
        self._number += 1
        return result

    def _count(self, entry: Entry, result: AttackResult) -> None:
        """Learn from an attack that ended how fast this machine is.

        An image that has fallen costs nothing more: what counts is what was asked, where the model
        was asked at all.
        """
        if entry.group not in _WARMING and result.error is None:
            work = entry.cost * int(result.attacked.sum())
            asked = result.gradients + (result.queries - result.gradients) / 3
            self._work += min(work, asked) if asked else work
            self._seconds += result.seconds

    def _wanted(self, entry: Entry, images: int, reserved: Sequence[Entry] | None) -> bool:
        if self.replay is not None:
            return entry.label in self.replay
        if self.budget.limit is None or not images:
            return True
        if self.budget.limit <= self.state.ended:  # it had its time, and is only read again
            return False
        rate = self._seconds / self._work if self._work else self.budget.step
        standing = int(self.standing.sum())
        kept = sum(other.cost for other in reserved or ()) * standing * rate
        left = self.budget.left - entry.cost * images * rate
        least = min(kept, _KEPT * self.budget.limit) + self.budget.kept(standing)
        if entry.group in _WARMING:  # next to nothing, and without any of it there is no figure
            least = 0.0
        return bool(world().agreed(left > least))

    def _left_out(self, entry: Entry) -> None:
        if self.replay is None:
            self.budget.skipped.append(entry.label)
        self.bar.skip(entry.cost * int(self.correct.sum()))

    def _escalate(self, suite: Suite, last: Sequence[Entry]) -> None:
        """Run round after round, until so many in a row each break less than half a point."""
        idle = 0
        for entry in suite.rounds:
            self.bar.extend(entry.cost * int(self.correct.sum()))
            result = self._one(entry, reserved=last)
            if result is None:
                continue
            few = int(result.broke.sum()) < masking.PAYS * len(self.correct)
            idle = idle + 1 if few else 0
            if idle == suite.patience:
                return


def _attack(fmodel: FoolboxModel, entry: Entry, data: Images, threat: Threat, batch: int,
            mask: np.ndarray, state: State, bar: Progress, forgiving: bool) -> AttackResult:
    """Run one attack on the images of mask, and judge what it returns.

    Args:
        forgiving: whether an attack that raises ends there, with what it broke before; else the
            error goes on.
    """
    here, error = world(), ""
    done = _Done(mask)
    try:
        _run(fmodel, entry, data, threat, batch, mask, state, bar, done)
    except Exception as raised:
        if not forgiving:
            raise
        error = f"{type(raised).__name__}: {(str(raised).splitlines() or [''])[0]}".strip(": ")
    if here.total_of(float(bool(error))):
        error = error or "failed in another process"
    broke, norms = here.joined(done.broke, done.mine), here.joined(done.norms, done.mine)
    state.adversarials = here.joined(state.adversarials, done.mine)
    state.margins = here.joined(state.margins, done.mine)
    own = round(here.total_of(done.own))
    queries, gradients = (round(here.total_of(count)) for count in done.asked.tolist())
    lengths = norms[np.isfinite(norms)]
    attacked = here.joined(done.mine, done.mine) if error else mask.copy()
    return AttackResult(entry.settings(), attacked, broke, own if done.minimum else None,
                        float(np.median(lengths)) if len(lengths) else None, queries, gradients,
                        time.monotonic() - done.begin, error or None)


class _Done:
    """What an attack has done so far, in this process.

    Attributes:
        broke, mine: (N,) what it broke, and which images it has been through.
        norms: (N,) of what a minimum-norm attack found by its own measure.
        own: how many it broke by that.
        asked: images passed forward, and with a gradient.
        minimum: whether it is a minimum-norm attack.
    """

    def __init__(self, mask: np.ndarray) -> None:
        self.begin, self.own, self.minimum = time.monotonic(), 0, False
        self.broke, self.mine = np.zeros((2, len(mask)), dtype=bool)
        self.norms, self.asked = np.full(len(mask), np.nan), np.zeros(2)


def _run(fmodel: FoolboxModel, entry: Entry, data: Images, threat: Threat, batch: int,
         mask: np.ndarray, state: State, bar: Progress, done: _Done) -> None:
    """Run one attack batch by batch, and note in done what it did."""
    import foolbox as fb
    model = fmodel.module
    counted = _counts(model)
    if isinstance(entry.attack, Substitute) and mask.any():
        entry.attack.fit(fmodel, data.pixels)
    done.asked = (_counts(model) - counted) * world().first
    minimum = done.minimum = isinstance(entry.attack, fb.attacks.base.MinimizationAttack)
    chosen, here = np.flatnonzero(mask), world()
    # whole batches are shared out, so that each is what it is in one process
    for first in here.part(range(0, len(chosen), batch)):
        rows = chosen[first : first + batch]
        full = max(len(rows), 2)  # a forward that squeezes its axes of size 1 takes no single image
        x, size = padded(data.pixels[rows], full)
        y, _ = padded(data.labels[rows], full)
        criterion = fb.criteria.Misclassification(y)
        counted = _counts(model)
        if minimum:
            raw = entry.attack.run(fmodel, x, criterion)
            # Foolbox answers "none found" with zeros, ours with the image.
            found = fools(model(raw), y) & (raw != 0).flatten(1).any(1)
            done.own += int(found[:size].sum())
            lengths = (raw - x)[:size].flatten(1).norm(dim=1)
            done.norms[rows] = torch.where(found[:size], lengths, torch.nan).cpu().numpy()
            raw = torch.where(found.reshape(-1, *[1] * (x.dim() - 1)), raw, x)
        else:
            options = {}
            if getattr(entry.attack, "restart", False):
                near = torch.from_numpy(state.adversarials[rows]).to(x)
                options["starting_points"] = padded(near, full)[0]
            with model.laid_out(x):
                raw = entry.attack.run(fmodel, x, criterion, epsilon=threat.eps, **options)
        done.asked = done.asked + (_counts(model) - counted) * size // full
        raw = torch.where(raw.isfinite(), raw.detach(), x)
        raw, x, y = (padded(v, batch)[0] for v in (raw, x, y))
        trial = project(raw, x, threat.eps, threat.norm, threat.bounds)
        with torch.no_grad():
            logits = model(trial)
        fooled = fools(logits, y)[:size].cpu().numpy()
        done.broke[rows], done.mine[rows] = fooled, True
        height = margin(logits, y)[:size].cpu().numpy()
        new = state.survived[rows] & (fooled | (height > state.margins[rows]))
        state.adversarials[rows[new]] = trial[:size].cpu().numpy()[new]
        state.margins[rows[new]] = height[new]
        standing = int((state.survived & ~done.broke).sum())
        bar.advance(entry.cost * size * here.size,
                    f"{entry.label}, {standing} of {len(mask)} standing")


def _counts(model: PixelModel) -> np.ndarray:
    """Return how many images have passed model forward, and with a gradient."""
    return np.array([model.queries, model.gradients])
