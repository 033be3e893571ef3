"""Flags that compare attacks: pure functions from counts of images to a :class:`Flag`."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.statistics import clopper_pearson, mcnemar
from .flags import PAYS, TOO_FEW, Flag, share_flag

# The number of attacks that a reason names; it counts the rest.
_NAMED = 3


def default_attacks_overstate(default_only: int, n: int, survivors: int) -> Flag:
    """Return the flag of default attacks (FGSM, PGD) that break less than the whole suite.

    Args:
        default_only: images that survive FGSM and PGD on both losses, and no other attack.
        n: all images.
        survivors: images that survive everything.
    """
    points = 100 * default_only / n if n else 0.0
    p = mcnemar(default_only, 0)
    raised = points >= 2 and p < 0.01
    reason = (f"Default attacks (FGSM, PGD) overstate this model by {points:.1f} points: "
              f"{survivors + default_only} of {n} images survive them, {survivors} survive the "
              "union.")
    return Flag("default attacks overstate", "masked", raised, points, 2.0,
                "at least 2 points and exact McNemar p < .01", reason)


def backward_modes_disagree(broken: int, n: int) -> Flag:
    """Return the flag of surrogate gradients that break more than the model's own gradient.

    Args:
        broken: images that survive FGSM and PGD through the model's own gradient and are broken
            by PGD through another backward mode.
        n: all images.
    """
    points = 100 * broken / n if n else 0.0
    raised = points >= 2 and mcnemar(broken, 0) < 0.01
    return Flag("backward modes disagree", "masked", raised, points, 2.0,
                "at least 2 points and exact McNemar p < .01",
                f"{broken} of {n} images survive the default gradient and are broken by another "
                "one" + (": the default gradient points the wrong way." if raised else "."))


def saturated_logits(scaled_only: int, plain_only: int, n: int) -> Flag:
    """Return the flag of logits so large that cross-entropy's gradient vanishes.

    Args:
        scaled_only: images that only PGD on rescaled logits broke.
        plain_only: images that only PGD on the original logits broke.
        n: all images.
    """
    points = 100 * (scaled_only - plain_only) / n if n else 0.0
    raised = points >= 2 and mcnemar(scaled_only, plain_only) < 0.01
    return Flag("saturated logits", "masked", raised, points, 2.0,
                "at least 2 points and exact McNemar p < .01",
                f"PGD on rescaled logits alone broke {scaled_only} images, PGD on the original "
                f"logits alone {plain_only}"
                + (": cross-entropy rounds to zero." if raised else "."))


def one_step_beats_many(one_only: int, many_only: int, n: int) -> Flag:
    """Return the flag of FGSM that breaks more than PGD, which starts from the same gradient.

    Args:
        one_only: images that only FGSM broke.
        many_only: images that only PGD broke.
        n: all images.
    """
    p = mcnemar(one_only, many_only)
    raised = one_only > many_only and p < 0.01
    points = 100 * (one_only - many_only) / n if n else 0.0
    return Flag("one step beats many", "unresolved", raised, points, 0.0,
                "FGSM breaks more than PGD, exact McNemar p < .01",
                f"FGSM alone broke {one_only} images, PGD alone {many_only}."
                + (" The loss surface misleads the attack." if raised else ""))


def gradient_free_beats_white_box(name: str, broken: int, survivors: int) -> Flag:
    """Return the flag of a gradient-free attack that breaks what white-box attacks do not.

    Args:
        name: the attack's group: ``noise``, ``transfer`` or ``black-box``.
        broken: images that it broke and no white-box attack did.
        survivors: images that survive every white-box attack.
    """
    return share_flag(f"{name} beats white-box", broken, survivors, 0.005, 0.02,
                      f"images that {name} broke and no white-box attack did",
                      "A stronger white-box attack exists; the figure is not the worst case.")


def escalation_still_pays(broken: list[int], rounds: int, n: int) -> Flag:
    """Return the flag of an escalation that still broke images in its last rounds.

    Args:
        broken: for each round, the images that it broke and earlier ones did not.
        rounds: the most rounds that could have run.
        n: all images.
    """
    raised = len(broken) == rounds and max(broken[-2:]) >= PAYS * n
    value = 100 * max(broken[-2:], default=0) / n if n else 0.0
    reason = f"{len(broken)} rounds of escalation broke {sum(broken)} images"
    return Flag("escalation still pays", "unresolved", raised, value, 100 * PAYS,
                f"two rounds in a row each break less than {100 * PAYS:g} % of the images",
                f"{reason}, the last two {broken[-2:]}: more rounds would break more." if raised
                else f"{reason}; the last two broke almost none.")


def another_seed_breaks_more(once: int, runs: int, n: int) -> Flag:
    """Return the flag of a strongest attack that would break more from another seed.

    The expected share of new images in the next run is the number of images that exactly one run
    broke, divided by the number of runs (Good 1953, doi:10.1093/biomet/40.3-4.237).

    Args:
        once: images that exactly one run broke.
        runs: runs from different seeds, on the same images.
        n: those images.
    """
    value = 100 * once / runs / n if n else 0.0
    lower, upper = (bound / runs for bound in clopper_pearson(once, n)) if n else (0.0, 0.0)
    kind, raised, end = "undecided", True, TOO_FEW
    if lower > 0.01:
        kind, raised, end = "unresolved", True, ": the next run would break more."
    elif upper < 0.02:
        kind, raised, end = "unresolved", False, "."
    return Flag("another seed breaks more", kind, raised, value, 1.0,
                f"images that exactly one of {runs} runs broke, over {runs}; one-sided 95 % "
                "Clopper-Pearson: raised where the lower bound is over 1 % of the images, clear "
                "where the upper bound is under 2 %",
                f"Of {n} survivors, exactly one of {runs} reseeded runs broke {once}{end}")


def not_monotone(survived: int, n: int) -> Flag:
    """Return the flag of an attack that breaks fewer images at a larger eps.

    Args:
        survived: pairs of an image and an eps that broke it, while it survives the next larger
            eps.
        n: all pairs of an image and an eps.
    """
    return share_flag("not monotone in eps", survived, n, 0.01, 0.02,
                      "pairs of an image and an eps that broke it while it survives the next "
                      "larger eps",
                      "An adversarial of a small eps is also allowed at a larger one: the attack "
                      "fails to find it again.")


def certificate_broken(broken: int, certified: int) -> Flag:
    """Return the flag of certified images that an attack broke.

    Args:
        broken: certified images that were broken.
        certified: all certified images.
    """
    return Flag("certificate broken", "unresolved", broken > 0, float(broken), 0.0,
                "no certified image is broken",
                f"{broken} of {certified} certified images were broken: the proof is void, by an "
                "error of ours or of the machine. Please report it." if broken else
                f"None of {certified} certified images was broken.")


def attacks_failed(labels: Sequence[str]) -> Flag:
    """Return the flag of attacks that raised an error."""
    return Flag("attacks failed", "undecided", bool(labels), float(len(labels)), 0.0,
                "no attack raised",
                f"{_named(labels)} raised an error and stopped there: see the table." if labels
                else "No attack raised.")


def attacks_left_out(skipped: Sequence[str]) -> Flag:
    """Return the flag of attacks, curve points and checks that were skipped for lack of time."""
    return Flag("attacks left out", "undecided", bool(skipped), float(len(skipped)), 0.0,
                "all attacks of the suite, the whole curve and all checks ran",
                f"No time was left for {_named(skipped)}. Give a larger budget." if skipped else
                "All attacks ran.")


def _named(labels: Sequence[str]) -> str:
    """Return the first few of some labels, and the number of the rest."""
    rest = len(labels) - _NAMED
    return ", ".join(labels[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def deciding_attack_missing(quantized: bool, groups: set[str]) -> Flag:
    """Return the flag of a suite without the attack that decides the figure.

    Args:
        quantized: whether the model has quantized activations: then an attack on its softened
            model decides, else PGD.
        groups: groups of the attacks that ran, see :class:`quantguard.attacks.Entry`.
    """
    softened = {"softened", "escalation", "reseeded"}
    needed = softened if quantized else {"pgd", "modes", *softened}
    missing = not needed & groups
    reason = "The suite has the attack that decides."
    if missing and quantized:
        reason = ("No attack on all images went through the softened model: surrogate gradients "
                  "alone overstate quantized activations. Give more time, use a named suite, or "
                  "add attacks.PGD(sharpness=(2, 16)).")
    elif missing:
        reason = "The suite has no PGD. Use a named suite, or add attacks.PGD()."
    return Flag("the attack that decides is missing", "undecided", missing, 0.0, 0.0,
                "the suite has PGD, on the softened model if there are quantized activations",
                reason)
