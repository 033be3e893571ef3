"""Flags: the result of one check each, and the verdict and conclusion drawn from all of them.

A flag of kind *masked* is about the model: default attacks overstate its robustness. A flag of
kind *unresolved* or *undecided* is about the evaluation: it may have missed the worst case, or it
has too few images to tell. :mod:`quantguard.evaluation.attack_flags` computes the flags that
compare attacks, :mod:`quantguard.evaluation.model_flags` those of the model itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.statistics import clopper_pearson, wilson

# A round of escalation pays if it breaks at least this share of the images.
PAYS = 0.005
# While one of these is raised, the share of survivors is not a property of the model.
WITHHELD = ("random forward", "depends on its batch")
# With this many images and no hit among them a share flag is clear: 0.98^149 is below 5 %.
ENOUGH = 149
# A model counts as robust if the share that survives is at least this share of clean accuracy. The
# value is a convention.
HALF = 0.5
# The end of a reason if the only problem is the number of images.
TOO_FEW = ": too few images to tell. Evaluate more images."


@dataclass(frozen=True)
class Flag:
    """Result of one check: the measured value, its threshold and what it means.

    Attributes:
        name: short name of the check.
        kind: ``masked``, ``unresolved`` or ``undecided``.
        raised: whether the check found a problem.
        value: the measured value, in per cent or points.
        threshold: the value from which the flag is raised.
        test: the statistical test.
        reason: one sentence for the user.
    """

    name: str
    kind: str
    raised: bool
    value: float
    threshold: float
    test: str
    reason: str


def share_flag(name: str, k: int, n: int, threshold: float, clear: float, what: str,
               consequence: str) -> Flag:
    """Return the flag of a share k of n: raised above threshold, clear below, else undecided."""
    value = 100 * k / n if n else 0.0
    test = (f"one-sided 95 % Clopper-Pearson: raised where the lower bound is over "
            f"{100 * threshold:g} %, clear where the upper bound is under {100 * clear:g} %")
    if n == 0:
        return Flag(name, "unresolved", False, 0.0, 100 * threshold, test, f"{what}: no images.")
    lower, upper = clopper_pearson(k, n)
    text = f"{what}: {k} of {n}"
    if lower > threshold:
        return Flag(name, "unresolved", True, value, 100 * threshold, test,
                    f"{text}. {consequence}")
    if upper < clear:
        return Flag(name, "unresolved", False, value, 100 * threshold, test, f"{text}.")
    return Flag(name, "undecided", True, value, 100 * threshold, test, text + TOO_FEW)


def verdict(flags: tuple[Flag, ...]) -> str:
    """Return the worst kind of the raised flags: ``unresolved``, ``undecided`` or ``resolved``."""
    kinds = {flag.kind for flag in flags if flag.raised}
    return next((kind for kind in ("unresolved", "undecided") if kind in kinds), "resolved")


def conclusion(flags: Sequence[Flag], images: int, correct: int, survived: int, certified: int,
               outcome: str) -> str:
    """Return the conclusion of an evaluation: the first of these phrases that applies.

    - ``no figure``: the forward is random or depends on the batch.
    - ``proven robust``: the lower end of Wilson's 95 % interval of the certified share is at least
      half of clean accuracy.
    - ``not robust``: nothing survives, or the upper end of the interval of the survivors is below
      half of clean accuracy. A lower upper bound would not change this.
    - ``hidden gradients``: a flag of kind masked is raised.
    - ``not settled``: the verdict is unresolved or undecided.
    - ``robust as measured``: none of the above.

    Args:
        flags: of the evaluation.
        images: number of all images.
        correct: number of images that are classified correctly without an attack.
        survived: number of images that survive every attack.
        certified: number of certified images; 0 if the certificate is void.
        outcome: of :func:`verdict`.
    """
    raised = [flag for flag in flags if flag.raised]
    bar = HALF * correct / images if images else 0.0
    if any(flag.name in WITHHELD for flag in raised):
        return "no figure"
    if certified and wilson(certified, images)[0] >= bar:
        return "proven robust"
    if not survived or wilson(survived, images)[1] < bar:
        return "not robust"
    if any(flag.kind == "masked" for flag in raised):
        return "hidden gradients"
    return "robust as measured" if outcome == "resolved" else "not settled"
