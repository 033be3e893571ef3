"""Flags of the model itself: pure functions from counts of images to a :class:`Flag`."""

from __future__ import annotations

from ..core.statistics import clopper_pearson
from .flags import Flag, share_flag

# A correlation of a gradient with true changes below this says that it is another function's.
_FAITHFUL, _FAITHFUL_SOFTENED = 0.75, 0.65


def softmax_outputs(found: bool) -> Flag:
    """Return the flag of a model that returns a softmax, which saturates cross-entropy."""
    return Flag("softmax outputs", "masked", found, 100.0 * found, 0.0,
                "every row is non-negative and sums to 1",
                "The model returns probabilities. Their logarithm was attacked; attacks that take "
                "them for logits overstate it." if found else "The model returns logits.")


def random_forward(differ: int, n: int) -> Flag:
    """Return the flag of a model that gives the same image different logits the second time.

    Args:
        differ: images whose logits differ.
        n: all images that were tried.
    """
    return Flag("random forward", "unresolved", differ > 0, 100 * differ / n if n else 0.0, 0.0,
                "the same images twice, bit for bit",
                f"{differ} of {n} images got other logits the second time: survival is partly "
                "luck. Switch the randomness off, or average over it in the model." if differ else
                "The same images get the same logits.")


def depends_on_its_batch(differ: int, n: int) -> Flag:
    """Return the flag of a model whose logits depend on the other images of the batch.

    Args:
        differ: images whose logits differ in another batch.
        n: all images that were tried.
    """
    raised = clopper_pearson(differ, n)[0] > 0.005
    advice = ": is BatchNorm in train mode? An attacker may choose the other images."
    return Flag("depends on its batch", "unresolved", raised, 100 * differ / n if n else 0.0, 0.5,
                "another arg max, or logits off by over 1e-4 of the largest; one-sided 95 % "
                "Clopper-Pearson lower bound over 0.5 %",
                f"{differ} of {n} images have other logits in another batch"
                + (advice if raised else "."))


def one_class_alone(alone: int, n: int) -> Flag:
    """Return the flag of a model that rules out all classes but one.

    Attacks then see no class to move an image to.

    Args:
        alone: images for which all other classes are ruled out.
        n: all images that were tried.
    """
    raised = clopper_pearson(alone, n)[0] > 0.1
    advice = (": attacks cannot see how near the other classes are. Evaluate the scores from "
              "before that step.")
    return Flag("one class alone", "unresolved", raised, 100 * alone / n if n else 0.0, 10.0,
                "all other logits are minus infinity or the like; one-sided 95 % Clopper-Pearson "
                "lower bound over 10 %",
                f"For {alone} of {n} images every class but one is ruled out"
                + (advice if raised else "."))


def gradient_misleads(correlation: float | None, softened: bool) -> Flag:
    """Return the flag of gradients that do not belong to the function that attacks maximise.

    A custom backward may be the gradient of another function. Among 60 evaluations of sound float
    models the lowest correlation is 0.957 (``benchmarks/sound.py``).

    Args:
        correlation: of the gradient with true changes of the margin; None: not measured.
        softened: whether gradient and changes are the softened model's, whose slopes end sooner.
    """
    least = _FAITHFUL_SOFTENED if softened else _FAITHFUL
    raised = correlation is not None and correlation < least
    advice = ": it is partly the gradient of another function. A better one may break more."
    reason = ("Fidelity was not measured." if correlation is None else
              f"The gradient predicts changes of the margin with a correlation of {correlation:.2f}"
              + (advice if raised else "."))
    return Flag("the gradient misleads", "unresolved", raised,
                0.0 if correlation is None else correlation, least,
                f"median correlation under {least:g}", reason)


def zero_gradients(zeros: int, n: int) -> Flag:
    """Return the flag of input gradients that are exactly zero, which gradient attacks need.

    Args:
        zeros: survivors with a zero gradient, at the image and at a random point.
        n: survivors that were tried.
    """
    return share_flag("zero input gradients", zeros, n, 0.01, 0.02,
                      "images whose input gradient is exactly zero, at the image and at a random "
                      "point",
                      "Gradient attacks are blind there; survival says nothing about robustness.")


def survives_without_bounds(survivors: int, n: int) -> Flag:
    """Return the flag of images that survive even if every pixel may take any value.

    Args:
        survivors: images that survive a white-box attack without a bound on eps.
        n: images that were tried.
    """
    return share_flag("survives without bounds", survivors, n, 0.01, 0.02,
                      "survivors that also survive if every pixel may take any value",
                      "Any image can be turned into another: the attack does not work on this "
                      "model.")
