"""Run a suite on images: the fallen are not attacked again, and what is done is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import masking
from .attacks import Entry, FoolboxModel, PixelModel, Substitute, Suite
from .attacks.losses import fools, margin, project
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
# By so much of a budget the last attacks may be late: how long they take is an estimate.
_LATE = 0.1
# Survivors that are enough to see whether another seed would break more.
_RESEEDED = 64


class State:
    """Hold an evaluation under way; a run directory keeps it after every attack."""

    def __init__(self, path: Path | None, settings: dict[str, Any], images: Images,
                 correct: np.ndarray) -> None:
        self.path, self.settings = path, settings
        self.survived = correct.copy()
        self.results: list[AttackResult] = []
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
        for row in told["results"]:
            row |= {k: mask_of(row[k], n) for k in ("attacked", "broke")}
            self.results.append(AttackResult(**row))
            self.survived &= ~self.results[-1].broke

    def add(self, result: AttackResult) -> None:
        self.results.append(result)
        self.survived &= ~result.broke
        if self.path is None or not world().first:
            return
        rows = [{**vars(r), "attacked": indices(r.attacked), "broke": indices(r.broke)}
                for r in self.results]
        with replacing(self.path) as beside:
            np.savez(beside, adversarials=self.adversarials, margins=self.margins,
                     state=json.dumps({"settings": self.settings, "results": rows}))


class Schedule:
    """Run what is not done yet, one attack after the other, within a budget of time.

    Args:
        model, data, threat, correct: what is attacked; correct (N,) bool.
        certified: (N,) images that no attack can break: only those that attack all images try.
        batch: the one size of all batches.
        state: what is done already.
        bar: shows progress.
        budget: seconds that all of it may take; None: no limit.
        replay: labels of the attacks that another evaluation ran: those run, no others.

    Attributes:
        skipped: labels of what there was no time for.
    """

    def __init__(self, model: PixelModel, data: Images, threat: Threat, batch: int,
                 correct: np.ndarray, certified: np.ndarray, state: State, bar: Progress,
                 budget: float | None = None,
                 replay: Sequence[str] | None = None) -> None:
        self.model, self.data, self.threat, self.batch = model, data, threat, batch
        self.correct, self.certified, self.state, self.bar = correct, certified, state, bar
        self.replay = None if replay is None else set(replay)
        spent = sum(result.seconds for result in state.results)
        self.budget = budget or 0.0
        self.deadline = None if budget is None else time.monotonic() + budget - spent
        self.skipped: list[str] = []
        self._number = 0
        self._work = self._seconds = 0.0  # of the attacks that ran: how fast this machine is

    @property
    def standing(self) -> np.ndarray:
        """Return (N,) the images that stand and might fall."""
        mask: np.ndarray = self.state.survived & ~self.certified
        return mask

    def run(self, suite: Suite) -> None:
        """Run the suite; what sees no gradient comes last, and its time is kept for it.

        Nothing is left out before PGD has shown how fast the model is.
        """
        last = [*suite.reseeded, *suite.blind]
        for entry in suite.entries:
            self._one(entry, reserved=suite.blind)
        self._escalate(suite.rounds, last)
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
        if mask is None:
            mask = self.correct if entry.everywhere else self.standing
        if not self._wanted(entry, int(mask.sum()), reserved):
            self._left_out(entry)
            return None
        result = _attack(FoolboxModel(self.model, self.threat), entry, self.data, self.threat,
                         self.batch, mask, state, self.bar)
        self.bar.skip(entry.cost * (every - int(result.attacked.sum())))
        state.add(result)
        self._count(entry, result)
        self._number += 1
        return result

    def _count(self, entry: Entry, result: AttackResult) -> None:
        """Learn from an attack that ended how fast this machine is."""
        if entry.group not in _WARMING:
            self._work += entry.cost * int(result.attacked.sum())
            self._seconds += result.seconds

    def _wanted(self, entry: Entry, images: int, reserved: Sequence[Entry] | None) -> bool:
        if self.replay is not None:
            return entry.label in self.replay
        if self.deadline is None or not self._work:
            return True
        rate, standing = self._seconds / self._work, int(self.standing.sum())
        kept = sum(other.cost for other in reserved or ()) * standing * rate
        left = self.deadline - time.monotonic() - entry.cost * images * rate
        least = min(kept, _KEPT * self.budget) if reserved is not None else -_LATE * self.budget
        return bool(world().agreed(left > least))

    def _left_out(self, entry: Entry) -> None:
        if self.replay is None:
            self.skipped.append(entry.label)
        self.bar.skip(entry.cost * int(self.correct.sum()))

    def _escalate(self, rounds: Sequence[Entry], last: Sequence[Entry]) -> None:
        """Run round after round, until two in a row each break less than half a point."""
        idle = 0
        for entry in rounds:
            self.bar.extend(entry.cost * int(self.correct.sum()))
            result = self._one(entry, reserved=last)
            if result is None:
                continue
            few = int(result.broke.sum()) < masking.PAYS * len(self.correct)
            idle = idle + 1 if few else 0
            if idle == 2:
                return


def _attack(fmodel: FoolboxModel, entry: Entry, data: Images, threat: Threat, batch: int,
            mask: np.ndarray, state: State, bar: Progress) -> AttackResult:
    """Run one attack on the images of mask, and judge what it returns."""
    import foolbox as fb
    begin = time.monotonic()
    model = fmodel.module
    counted = _counts(model)
    if isinstance(entry.attack, Substitute) and mask.any():
        entry.attack.fit(fmodel, data.pixels)
    asked = (_counts(model) - counted) * world().first
    minimum = isinstance(entry.attack, fb.attacks.base.MinimizationAttack)
    broke, own, norms = np.zeros(len(mask), dtype=bool), 0, np.full(len(mask), np.nan)
    chosen, here = np.flatnonzero(mask), world()
    mine = np.zeros(len(mask), dtype=bool)
    # whole batches are shared out, so that each is what it is in one process
    for first in here.part(range(0, len(chosen), batch)):
        rows = chosen[first : first + batch]
        mine[rows] = True
        full = max(len(rows), 2)  # a forward that squeezes its axes of size 1 takes no single image
        x, size = padded(data.pixels[rows], full)
        y, _ = padded(data.labels[rows], full)
        criterion = fb.criteria.Misclassification(y)
        counted = _counts(model)
        if minimum:
            raw = entry.attack.run(fmodel, x, criterion)
            # Foolbox answers "none found" with zeros, ours with the image.
            found = fools(model(raw), y) & (raw != 0).flatten(1).any(1)
            own += int(found[:size].sum())
            lengths = (raw - x)[:size].flatten(1).norm(dim=1)
            norms[rows] = torch.where(found[:size], lengths, torch.nan).cpu().numpy()
            raw = torch.where(found.reshape(-1, *[1] * (x.dim() - 1)), raw, x)
        else:
            options = {}
            if getattr(entry.attack, "restart", False):
                near = torch.from_numpy(state.adversarials[rows]).to(x)
                options["starting_points"] = padded(near, full)[0]
            with model.laid_out(x):
                raw = entry.attack.run(fmodel, x, criterion, epsilon=threat.eps, **options)
        asked += (_counts(model) - counted) * size // full
        raw = torch.where(raw.isfinite(), raw.detach(), x)
        raw, x, y = (padded(v, batch)[0] for v in (raw, x, y))
        trial = project(raw, x, threat.eps, threat.norm, threat.bounds)
        with torch.no_grad():
            logits = model(trial)
        fooled = fools(logits, y)[:size].cpu().numpy()
        broke[rows] = fooled
        height = margin(logits, y)[:size].cpu().numpy()
        new = state.survived[rows] & (fooled | (height > state.margins[rows]))
        state.adversarials[rows[new]] = trial[:size].cpu().numpy()[new]
        state.margins[rows[new]] = height[new]
        standing = int((state.survived & ~broke).sum())
        bar.advance(entry.cost * size * here.size,
                    f"{entry.label}, {standing} of {len(mask)} standing")
    broke, norms = here.joined(broke, mine), here.joined(norms, mine)
    state.adversarials = here.joined(state.adversarials, mine)
    state.margins = here.joined(state.margins, mine)
    own = round(here.total_of(own))
    queries, gradients = (round(here.total_of(count)) for count in asked.tolist())
    lengths = norms[np.isfinite(norms)]
    return AttackResult(entry.settings(), mask.copy(), broke, own if minimum else None,
                        float(np.median(lengths)) if len(lengths) else None, queries, gradients,
                        time.monotonic() - begin)


def _counts(model: PixelModel) -> np.ndarray:
    """Return how many images have passed model forward, and with a gradient."""
    return np.array([model.queries, model.gradients])
