"""Red flags: pure functions from counts of images to a Flag, and the statistics beneath them.

A flag of kind *masked* is about the model: default attacks overstate it. One of kind *unresolved*
or *undecided* is about our own evaluation: the worst case may not be found, or the images are too
few to tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

_Z = NormalDist().inv_cdf(0.975)
# A round of attacks pays where it breaks this share of the images.
PAYS = 0.005
# With these raised a share of survivors is no property of the model.
WITHHELD = ("random forward", "depends on its batch")


# Images of which none speaks that are enough: 0.98^149 is below 5 %.
ENOUGH = 149
# A gradient's correlation with true changes below which it is not the function's own.
_FAITHFUL, _FAITHFUL_SOFTENED = 0.75, 0.65
# Attacks without time that one reason names.
_NAMED = 3
# A model is robust, or not, as the share that survives is above or below this share of what it gets
# right unattacked: a convention.
HALF = 0.5
# How a reason ends where nothing speaks but how few images there are.
TOO_FEW = ": too few images to tell. Evaluate more images."


@dataclass(frozen=True)
class Flag:
    """Hold one check: what it measured, its threshold, and what that means.

    Attributes:
        name: short name of the check.
        kind: ``masked``, ``unresolved`` or ``undecided``.
        raised: whether it speaks.
        value: the figure, in per cent or points.
        threshold: the figure from which it speaks.
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


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, _Z * _Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == n else middle + half
    return low, high


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided exact McNemar p-value of two paired outcomes (McNemar 1947)."""
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    tail: float = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2 * tail)


def _at_most(k: int, n: int, p: float) -> float:
    """Return P(X <= k), X binomial; summed in logarithms, so that no term overflows."""
    if p <= 0 or k >= n:
        return 1.0
    if p >= 1:
        return 0.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
            + i * math.log(p) + (n - i) * math.log1p(-p) for i in range(k + 1)]
    top = max(logs)
    return min(1.0, math.exp(top) * sum(math.exp(v - top) for v in logs))


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return both one-sided exact bounds of a proportion (Clopper, Pearson 1934)."""
    def solve(above: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if above(middle) else (low, middle)
        return (low + high) / 2
    lower = 0.0 if k == 0 else solve(lambda p: 1 - _at_most(k - 1, n, p) < 1 - level)
    upper = 1.0 if k == n else solve(lambda p: _at_most(k, n, p) > 1 - level)
    return lower, upper


def _share(name: str, k: int, n: int, threshold: float, clear: float, what: str,
           so: str) -> Flag:
    """Judge a share k of n: raised above threshold, clear below, undecided between."""
    value = 100 * k / n if n else 0.0
    test = (f"one-sided 95 % Clopper-Pearson: raised where the lower bound is over "
            f"{100 * threshold:g} %, clear where the upper bound is under {100 * clear:g} %")
    if n == 0:
        return Flag(name, "unresolved", False, 0.0, 100 * threshold, test, f"{what}: no images.")
    lower, upper = clopper_pearson(k, n)
    text = f"{what}: {k} of {n}"
    if lower > threshold:
        return Flag(name, "unresolved", True, value, 100 * threshold, test, f"{text}. {so}")
    if upper < clear:
        return Flag(name, "unresolved", False, value, 100 * threshold, test, f"{text}.")
    return Flag(name, "undecided", True, value, 100 * threshold, test, text + TOO_FEW)


def overstated(default_only: int, n: int, standing: int) -> Flag:
    """Say by how much default PGD overstates the model against the union of all attacks.

    Args:
        default_only: images that survive FGSM and PGD on both losses, and fall to another attack.
        n: all images.
        standing: images that survive everything.
    """
    points = 100 * default_only / n if n else 0.0
    p = mcnemar(default_only, 0)
    raised = points >= 2 and p < 0.01
    reason = (f"Default attacks (FGSM, PGD) overstate this model by {points:.1f} points: "
              f"{standing + default_only} of {n} images survive them, {standing} survive the "
              "union.")
    return Flag("default attacks overstate", "masked", raised, points, 2.0,
                "at least 2 points and exact McNemar p < .01", reason)


def zero_gradients(zeros: int, n: int) -> Flag:
    """Say whether exactly zero input gradients leave gradient attacks blind."""
    return _share("zero input gradients", zeros, n, 0.01, 0.02,
                  "images whose input gradient is exactly zero, at the image and at a random point",
                  "Gradient attacks are blind there; survival says nothing about robustness.")


def gradient_misleads(correlation: float | None, softened: bool) -> Flag:
    """Say whether the gradient that attacks climb is that of what they climb.

    A backward that somebody wrote may be another function's. Of 60 evaluations of sound float
    models the least is 0.957 (``benchmarks/sound.py``).

    Args:
        correlation: of the gradient with true changes of the margin; None: not measured.
        softened: whether both are the softened model's, whose slopes end sooner.
    """
    least = _FAITHFUL_SOFTENED if softened else _FAITHFUL
    raised = correlation is not None and correlation < least
    reason = ("Fidelity was not measured." if correlation is None else
              f"The gradient foretells what the margin does with a correlation of {correlation:.2f}"
              + (": it is another function's, in part. A better one may break more."
                 if raised else "."))
    return Flag("the gradient misleads", "unresolved", raised,
                0.0 if correlation is None else correlation, least,
                f"median correlation under {least:g}", reason)


def one_step_beats_many(one_only: int, many_only: int, n: int) -> Flag:
    """Say whether FGSM breaks more than PGD, which climbs from the same place."""
    p = mcnemar(one_only, many_only)
    raised = one_only > many_only and p < 0.01
    points = 100 * (one_only - many_only) / n if n else 0.0
    return Flag("one step beats many", "unresolved", raised, points, 0.0,
                "FGSM breaks more than PGD, exact McNemar p < .01",
                f"FGSM alone broke {one_only} images, PGD alone {many_only}."
                + (" The loss surface misleads the attack." if raised else ""))


def blind_beats_seeing(name: str, broken: int, standing: int) -> Flag:
    """Say whether noise or transfer broke what no white-box attack did.

    Args:
        name: ``noise`` or ``transfer``.
        broken: images broken by it and by no white-box attack.
        standing: images that every white-box attack left standing.
    """
    return _share(f"{name} beats white-box", broken, standing, 0.005, 0.02,
                  f"images that {name} broke and no white-box attack did",
                  "A stronger white-box attack exists; the figure is not the worst case.")


def escalation_pays(broken: list[int], rounds: int, n: int) -> Flag:
    """Say whether ever stronger attacks still broke images when there were no more of them.

    Args:
        broken: images that each round broke which the ones before had left standing.
        rounds: how many there could have been.
        n: all images.
    """
    pays = len(broken) == rounds and max(broken[-2:]) >= PAYS * n
    value = 100 * max(broken[-2:], default=0) / n if n else 0.0
    reason = f"{len(broken)} rounds of escalation broke {sum(broken)} images"
    return Flag("escalation still pays", "unresolved", pays, value, 100 * PAYS,
                f"two rounds in a row each break less than {100 * PAYS:g} % of the images",
                f"{reason}, the last two {broken[-2:]}: more would break more." if pays else
                f"{reason}; the last two broke next to none.")


def reseeding_pays(once: int, runs: int, n: int) -> Flag:
    """Say whether another seed of the strongest attack would break more.

    What one of several runs alone breaks foretells what the next one breaks anew: its share is the
    images broken by exactly one run, over the runs (Good 1953, doi:10.1093/biomet/40.3-4.237).

    Args:
        once: images that exactly one run broke.
        runs: runs from different seeds, on the same images.
        n: those images.
    """
    name, test = "another seed breaks more", (
        f"images that exactly one of {runs} runs broke, over {runs}; one-sided 95 % "
        "Clopper-Pearson: raised where the lower bound is over 1 % of the images, clear where the "
        "upper bound is under 2 %")
    value = 100 * once / runs / n if n else 0.0
    lower, upper = (bound / runs for bound in clopper_pearson(once, n)) if n else (0.0, 0.0)
    text = f"Of {n} images that stood, exactly one of {runs} reseeded runs broke {once}"
    if lower > 0.01:
        return Flag(name, "unresolved", True, value, 1.0, test,
                    f"{text}: the next run would break more.")
    if upper < 0.02:
        return Flag(name, "unresolved", False, value, 1.0, test, f"{text}.")
    return Flag(name, "undecided", True, value, 1.0, test, text + TOO_FEW)


def not_monotone(stood: int, n: int) -> Flag:
    """Say whether more room for the attacker broke less.

    Args:
        stood: pairs of an image and an eps at which it fell, while it stood at the next larger one.
        n: all pairs of an image and an eps.
    """
    return _share("not monotone in eps", stood, n, 0.01, 0.02,
                  "pairs of an image and an eps at which it fell, and stood at the next larger one",
                  "What breaks at a small eps is allowed at a large one: the attack loses its way.")


def refuted(broken: int, certified: int) -> Flag:
    """Say that an attack broke what was proven to withstand every attack."""
    return Flag("certificate broken", "unresolved", broken > 0, float(broken), 0.0,
                "no certified image is broken",
                f"{broken} of {certified} certified images were broken: the proof is void, by an "
                "error of ours or of the machine. Please report it." if broken else
                f"None of {certified} certified images was broken.")


def failed(labels: Sequence[str]) -> Flag:
    """Say that attacks raised instead of ending."""
    several = ", ".join(labels[:_NAMED]) + \
        f" and {len(labels) - _NAMED} more" * (len(labels) > _NAMED)
    return Flag("attacks failed", "undecided", bool(labels), float(len(labels)), 0.0,
                "no attack raised", f"{several} raised an error and tried nothing more: see the "
                "table." if labels else "No attack raised.")


def left_out(skipped: Sequence[str]) -> Flag:
    """Say that attacks, points of the curve or checks were left out for lack of time."""
    several = ", ".join(skipped[:_NAMED]) + \
        f" and {len(skipped) - _NAMED} more" * (len(skipped) > _NAMED)
    return Flag("attacks left out", "undecided", bool(skipped), float(len(skipped)), 0.0,
                "all attacks of the suite, the whole curve and all checks ran",
                f"No time was left for {several}. Give a larger budget." if skipped else
                "All attacks ran.")


def modes_disagree(broken: int, n: int) -> Flag:
    """Say whether other surrogate gradients break what the default one does not.

    Args:
        broken: images that survive FGSM and PGD through the model's own gradient and fall to PGD
            through another backward mode.
        n: all images.
    """
    points = 100 * broken / n if n else 0.0
    raised = points >= 2 and mcnemar(broken, 0) < 0.01
    return Flag("backward modes disagree", "masked", raised, points, 2.0,
                "at least 2 points and exact McNemar p < .01",
                f"{broken} of {n} images survive the default gradient and fall to another one: the "
                "default gradient hides where to go." if raised else
                f"{broken} of {n} images survive the default gradient and fall to another one.")


def saturated_logits(scaled_only: int, plain_only: int, n: int) -> Flag:
    """Say whether large logits hide cross-entropy's gradient.

    Args:
        scaled_only: images that only PGD on rescaled logits broke.
        plain_only: those that only PGD on the logits as they are broke.
        n: all images.
    """
    points = 100 * (scaled_only - plain_only) / n if n else 0.0
    raised = points >= 2 and mcnemar(scaled_only, plain_only) < 0.01
    return Flag("saturated logits", "masked", raised, points, 2.0,
                "at least 2 points and exact McNemar p < .01",
                f"PGD on rescaled logits alone broke {scaled_only} images, on the logits as they "
                f"are {plain_only}" + (": cross-entropy rounds to nothing." if raised else "."))


def probabilities(found: bool) -> Flag:
    """Say that the model puts out a softmax, which saturates before any attack sees it."""
    return Flag("softmax outputs", "masked", found, 100.0 * found, 0.0,
                "every row is non-negative and sums to 1",
                "The model puts out probabilities. Their logarithm was attacked; attacks that take "
                "them for logits overstate it." if found else "The model puts out logits.")


def one_class_alone(alone: int, n: int) -> Flag:
    """Say that the model names a class and rules all others out: attacks see none to go to."""
    raised = clopper_pearson(alone, n)[0] > 0.1
    return Flag("one class alone", "unresolved", raised, 100 * alone / n if n else 0.0, 10.0,
                "all other logits are minus infinity or the like; one-sided 95 % Clopper-Pearson "
                "lower bound over 10 %",
                f"For {alone} of {n} images every class but the named one is ruled out"
                + (": no attack sees how near the others are. Evaluate the scores before that."
                   if raised else "."))


def random_forward(differ: int, n: int) -> Flag:
    """Say that the same image gets another answer the second time."""
    return Flag("random forward", "unresolved", differ > 0, 100 * differ / n if n else 0.0, 0.0,
                "the same images twice, to the bit",
                f"{differ} of {n} images got other logits the second time: survival is partly "
                "luck. Switch the randomness off, or average over it in the model." if differ else
                "The same images get the same logits.")


def looks_at_its_batch(differ: int, n: int) -> Flag:
    """Say that an image's answer depends on the images beside it."""
    raised = clopper_pearson(differ, n)[0] > 0.005
    return Flag("depends on its batch", "unresolved", raised, 100 * differ / n if n else 0.0, 0.5,
                "other arg max, or logits off by over 1e-4 of the largest; one-sided 95 % "
                "Clopper-Pearson lower bound over 0.5 %",
                f"{differ} of {n} images have another answer in another batch"
                + (": BatchNorm in train mode, perhaps? An attacker may choose the other images."
                   if raised else "."))


def unbounded(standing: int, n: int) -> Flag:
    """Say whether survivors stand even where every pixel may take any value.

    Args:
        standing: survivors that a white-box attack without a bound on eps left standing.
        n: survivors.
    """
    return _share("survives without bounds", standing, n, 0.01, 0.02,
                  "survivors that stand where every pixel may take any value",
                  "Any image can be turned into another: the attack does not work on this model.")


def unseen(quantized: bool, groups: set[str]) -> Flag:
    """Say that the suite lacks the attack that decides.

    Args:
        quantized: whether the model has staircases: then its softened twin must be attacked.
        groups: what the suite's attacks stand for, see :class:`quantguard.attacks.Entry`.
    """
    twins = {"twin", "escalation", "reseeded"}
    needed = twins if quantized else {"pgd", "modes", *twins}
    missing = not needed & groups
    reason = "The suite holds the attack that decides."
    if missing and quantized:
        reason = ("No attack on all images went through the softened twin: surrogate gradients "
                  "alone overstate staircases. Give more time, use a named suite, or add "
                  "attacks.PGD(twin=(2, 16)).")
    elif missing:
        reason = "The suite holds no PGD. Use a named suite, or add attacks.PGD()."
    return Flag("the attack that decides is missing", "undecided", missing, 0.0, 0.0,
                "the suite holds PGD, through the softened twin where there are staircases", reason)


def verdict(flags: tuple[Flag, ...]) -> str:
    """Return ``resolved``, ``undecided`` or ``unresolved``: the worst of the raised flags."""
    kinds = {flag.kind for flag in flags if flag.raised}
    return next((kind for kind in ("unresolved", "undecided") if kind in kinds), "resolved")


def conclusion(flags: Sequence[Flag], images: int, correct: int, survived: int, certified: int,
               settled: str) -> str:
    """Return what to make of an evaluation, in one phrase: the first of these that applies.

    ``no figure``: the forward is random or looks at its batch. ``proven robust``: the lower end of
    what is certified, by Wilson's 95 % interval, is at least half of clean accuracy. ``not
    robust``: the upper end of what survives is below that, or nothing survives. ``hidden
    gradients``: a flag of kind masked. ``not settled``: unresolved or undecided. ``robust as
    measured``. That an upper bound might be lower still changes nothing about ``not robust``.

    Args:
        flags: of the evaluation.
        images, correct, survived, certified: how many there are, are right unattacked, survive
            every attack, and are proven to; certified 0 where the proof is void.
        settled: its verdict.
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
    return "robust as measured" if settled == "resolved" else "not settled"
