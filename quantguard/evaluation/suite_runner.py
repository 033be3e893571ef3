"""Run a suite attack by attack: what runs, in which order, and what there is no time for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..attacks import Entry, Suite
from ..core.distributed import distributed
from ..core.progress import Progress
from . import flags as checks
from .attack_result import AttackResult
from .attack_runner import run_attack
from .evaluation_state import EvaluationState
from .task import EvaluationTask
from .time_limit import Budget

# Groups of attacks that take almost no time. Their first calls compile, so that their speed says
# nothing about later attacks.
_WARMUP = ("noise", "fgsm")
# The end of the label of a reseeded attack that runs again on images it has not attacked yet.
OTHERS = ", the others"
# The largest share of a time limit that is reserved for gradient-free attacks. It is no larger
# because on quantized activations other attacks break more.
_RESERVED = 0.25
# The number of survivors that show whether another seed would break more.
_RESEEDED = 64
# The number of survivors, nearest to the boundary first, that attacks with many queries search.
_NEAREST = 48


class SuiteRunner:
    """Runs the attacks that are not done yet, one after the other, within a time limit.

    Args:
        task: model, images and threat.
        certified: (N,) images that no attack can break: only attacks on all images try them.
        state: what is done already.
        bar: shows progress.
        budget: the time limit; labels of attacks that do not fit are listed in it.
        replay: the attacks that another evaluation ran, by label, and whether each ran on all
            correct images: these run, no others.
        tolerant: whether an attack that raises an error only fails itself; otherwise the error is
            raised.
    """

    def __init__(self, task: EvaluationTask, certified: np.ndarray, state: EvaluationState,
                 bar: Progress, budget: Budget, replay: Mapping[str, bool] | None = None,
                 tolerant: bool = False) -> None:
        self.task, self.certified, self.state, self.bar = task, certified, state, bar
        self.replay = replay
        self.budget, self.tolerant = budget, tolerant
        budget.spend(sum(result.seconds for result in state.results))
        self._number = 0
        self._total = int(task.correct.sum())
        self._work = self._seconds = 0.0  # of the attacks so far: the speed of this machine

    @property
    def survivors(self) -> np.ndarray:
        """Return (N,) the images that survive so far and are not certified."""
        mask: np.ndarray = self.state.survived & ~self.certified
        return mask

    def run(self, suite: Suite) -> None:
        """Run the suite; gradient-free attacks come last, and time is reserved for them."""
        last = [*suite.reseeded, *suite.gradient_free]
        for entry in suite.entries:
            self._run_entry(entry, reserved=suite.gradient_free)
        self._escalate(suite, last)
        self._reseed(suite)
        for entry in suite.gradient_free:
            self._run_entry(entry)
        for entry in suite.searches:
            self.bar.extend(entry.cost * self._total)
            self._run_entry(entry, self._nearest())
        if self.budget.limit is not None:
            self.state.end(self.budget.limit)

    def _escalate(self, suite: Suite, last: Sequence[Entry]) -> None:
        """Run round after round, until several in a row each break less than half a point."""
        idle = 0
        for entry in suite.rounds:
            self.bar.extend(entry.cost * self._total)
            result = self._run_entry(entry, reserved=last)
            if result is None:
                continue
            few = int(result.broken.sum()) < checks.PAYS * len(self.task.correct)
            idle = idle + 1 if few else 0
            if idle == suite.patience:
                return

    def _reseed(self, suite: Suite) -> None:
        """Run the strongest attack from other seeds on a few survivors.

        If that breaks any, it runs on the other survivors, too.
        """
        few = self.survivors.copy()
        few[np.flatnonzero(few)[_RESEEDED:]] = False
        results = [self._run_entry(entry, few, reserved=suite.gradient_free)
                   for entry in suite.reseeded]
        pays = any(result is not None and result.broken.any() for result in results)
        if pays and bool((self.survivors & ~few).any()):
            for entry in suite.reseeded:
                self.bar.extend(entry.cost * self._total)
                self._run_entry(replace(entry, label=entry.label + OTHERS, group="softened"),
                                self.survivors & ~few, reserved=suite.gradient_free)

    def _nearest(self) -> np.ndarray:
        """Return (N,) the survivors whose best adversarials are nearest to the boundary."""
        mask, rows = np.zeros_like(self.task.correct), np.flatnonzero(self.survivors)
        order = np.argsort(-self.state.margins[rows], kind="stable")
        mask[rows[order[:_NEAREST]]] = True
        return mask

    def _run_entry(self, entry: Entry, mask: np.ndarray | None = None,
                   reserved: Sequence[Entry] | None = None) -> AttackResult | None:
        """Run an attack or take its result from the run directory; return None if it is left out.

        Args:
            entry: the attack.
            mask: (N,) the images; None: all correct ones or the survivors, as the entry asks.
            reserved: attacks that should have time afterwards; None: no time is reserved.
        """
        state = self.state
        if self._number < len(state.results):
            if state.results[self._number].label != entry.label:  # the saved run left it out
                self._leave_out(entry)
                return None
            self.bar.skip(entry.cost * self._total)
            self._number += 1
            self._measure(entry, state.results[self._number - 1])
            return state.results[self._number - 1]
        if mask is None and entry.everywhere and self.replay is None \
                and self._fits(entry, self._total, reserved):
            mask = self.task.correct
        elif mask is None:  # without time for all correct images, perhaps for the survivors
            everywhere = entry.everywhere and (self.replay or {}).get(entry.label, False)
            entry = replace(entry, everywhere=everywhere)
            mask = self.task.correct if everywhere else self.survivors
        if not self._fits(entry, int(mask.sum()), reserved):
            self._leave_out(entry)
            return None
        result = run_attack(self.task, entry, mask, state, self.bar, self.tolerant)
        self.bar.skip(entry.cost * (self._total - int(result.attacked.sum())))
        state.add(result)
        self._measure(entry, result)
        self._number += 1
        return result

    def _measure(self, entry: Entry, result: AttackResult) -> None:
        """Update the measured speed with an attack that is done.

        A broken image costs nothing more, so that passes through the model are counted, not
        images. Attacks that do not pass anything through the model are counted by their images.
        """
        if entry.group not in _WARMUP and result.error is None:
            work = entry.cost * int(result.attacked.sum())
            passes = result.gradients + (result.queries - result.gradients) / 3
            self._work += min(work, passes) if passes else work
            self._seconds += result.seconds

    def _fits(self, entry: Entry, images: int, reserved: Sequence[Entry] | None) -> bool:
        """Return whether there is time for an attack on some images, or whether a replay has it."""
        if self.replay is not None:
            return entry.label in self.replay
        if self.budget.limit is None or not images:
            return True
        if self.budget.limit <= self.state.ended:  # a saved run has used this time already
            return False
        rate = self._seconds / self._work if self._work else self.budget.step
        survivors = int(self.survivors.sum())
        for_others = sum(other.cost for other in reserved or ()) * survivors * rate
        left = self.budget.left - entry.cost * images * rate
        least = min(for_others, _RESERVED * self.budget.limit) + self.budget.reserved(survivors)
        if entry.group in _WARMUP:  # they are fast, and without any attack there is no figure
            least = 0.0
        return bool(distributed().agreed(left > least))

    def _leave_out(self, entry: Entry) -> None:
        """List an attack as skipped."""
        if self.replay is None:
            self.budget.skipped.append(entry.label)
        self.bar.skip(entry.cost * self._total)
