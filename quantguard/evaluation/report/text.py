"""Results as plain text, and the lines and tables that the HTML shows, too."""

from __future__ import annotations

import numpy as np

from ...core.progress import duration
from ...core.rendering import Cell, as_text, sample_text, table
from ..comparison import Comparison
from ..flags import ENOUGH, TOO_FEW, Flag
from ..results import Evaluation

UPPER_BOUND = ("Attacked figures are upper bounds of the truth: a stronger attack can only lower "
               "them.\nIntervals are 95 % Wilson and cover the sampling of images only.")

BOUNDS = ("Attacked figures are upper bounds of the truth: a stronger attack can only lower them; "
          "certified ones are\nlower bounds, for the float32 model that runs. Intervals are 95 % "
          "Wilson and cover the sampling of images only.")

# Clean accuracy below this suggests that the images are not normalised as in training.
_LOW = 0.5


def columns(evaluation: Evaluation) -> dict[str, Cell]:
    """Return the columns of a table: clean, each attack that ran on all images, worst case."""
    n = evaluation.images

    def cell(mask: np.ndarray) -> Cell:
        return Cell(int(mask.sum()), n)
    result = {"clean": cell(evaluation.correct)}
    for attack in evaluation.attacks:
        if attack.settings.get("everywhere") and attack.error is None:
            result[attack.label] = cell(evaluation.correct & ~attack.broken)
    if evaluation.certificate is not None:
        result["certified"] = cell(evaluation.certified)
    result["worst case"] = cell(evaluation.survived)
    return result


def all_columns(comparison: Comparison) -> list[str]:
    """Return the columns of all rows, in the order of the row that has most."""
    each = [list(columns(evaluation)) for evaluation in comparison.rows.values()]
    fullest = max(each, key=len)
    return [*fullest[:-1], *dict.fromkeys(name for names in each for name in names
                                          if name not in fullest), fullest[-1]]


def bounds_of(comparison: Comparison) -> str:
    """Return the sentence on the kind of bounds that a comparison's figures are."""
    certified = any(e.certificate is not None for e in comparison.rows.values())
    return BOUNDS if certified else UPPER_BOUND


def headline(evaluation: Evaluation) -> str:
    """Return conclusion, figure and verdict in one line; no figure if it is withheld."""
    if evaluation.withheld:
        return "NO FIGURE: " + " ".join(flag.reason for flag in evaluation.withheld)
    figure = bracket_line(evaluation) if evaluation.certificate is not None \
        and not evaluation.refuted else attacked_line(evaluation)
    return (f"{evaluation.conclusion.upper()}: {figure} {_verdict_sentence(evaluation)}"
            f"{_masked_sentence(evaluation)}")


def attacked_line(evaluation: Evaluation) -> str:
    """Return the figure alone: the share of images that survive every attack."""
    cell = Cell(int(evaluation.survived.sum()), evaluation.images)
    low, high = cell.interval
    return (f"Robust accuracy <= {100 * cell.share:.1f} % (95 % interval {100 * low:.1f}-"
            f"{100 * high:.1f}; {cell.count} of {cell.n} images survive every attack).")


def _verdict_sentence(evaluation: Evaluation) -> str:
    """Return the verdict, and what it means for the conclusion."""
    named = evaluation.verdict.capitalize()
    if evaluation.verdict == "resolved":
        return f"{named}: no check speaks against the figure."
    if evaluation.conclusion == "not robust":
        return f"{named}, but a stronger attack can only lower it."
    if evaluation.conclusion == "proven robust":
        return f"{named} above what is proven."
    if evaluation.verdict == "unresolved":
        return f"{named}: the worst case has not been found yet."
    return f"{named}: too little was checked to call it the worst case."


def _masked_sentence(evaluation: Evaluation) -> str:
    """Return a warning that default attacks overstate the model, if flags of kind masked do."""
    names = [flag.name for flag in evaluation.flags if flag.raised and flag.kind == "masked"]
    return f" The model hides its gradients: {', '.join(names)}." if names else ""


def bracket_line(evaluation: Evaluation) -> str:
    """Return lower and upper bound of the truth: the shares of certified images and survivors."""
    n = evaluation.images
    proven, survivors = (Cell(int(mask.sum()), n) for mask in (evaluation.certified,
                                                              evaluation.survived))
    low, high = proven.interval[0], survivors.interval[1]
    gap = survivors.count - proven.count
    closed = "" if gap else " Nothing is left open."
    return (f"Certified {100 * proven.share:.1f} % <= true robust accuracy <= "
            f"{100 * survivors.share:.1f} % attacked ({proven.count} of {n} images are proven to "
            f"withstand every attack, {survivors.count} survived them all; 95 % interval of both "
            f"ends {100 * low:.1f}-{100 * high:.1f}).{closed}")


def attack_rows(evaluation: Evaluation) -> list[list[str]]:
    """Return one row an attack, header first; attacks without images share the last row."""
    rows = [["attack", "attacked", "broken", "survivors", "gradients/image", "time"]]
    survivors = evaluation.correct.copy()
    idle = [a for a in evaluation.attacks if not a.attacked.any() and a.error is None]
    for attack in evaluation.attacks:
        survivors &= ~attack.broken
        attacked = int(attack.attacked.sum())
        if not attacked and attack.error is None:
            continue
        per_image = f"{attack.gradients / attacked:.0f}" if attacked else "-"
        label = attack.label if attack.error is None else f"{attack.label}: {attack.error}"
        rows.append([label, str(attacked), str(int(attack.broken.sum())),
                     str(int(survivors.sum())), per_image, duration(attack.seconds)])
    if idle:
        label = idle[0].label + (f" and {len(idle) - 1} more" if len(idle) > 1 else "")
        rows.append([f"{label}: all was broken", "0", "0", str(int(survivors.sum())), "-",
                     duration(sum(a.seconds for a in idle))])
    return rows


def side_lines(evaluation: Evaluation) -> list[str]:
    """Return the lines below the table: minimum-norm attacks, fidelity, curve, skipped work."""
    lines = [f"{a.label} by its own measure: succeeds on {a.own_success} of "
             f"{int(a.attacked.sum())} images, median L2 norm "
             f"{'-' if a.median_norm is None else format(a.median_norm, '.3g')}; its column counts "
             "successes after clipping to the threat."
             for a in evaluation.attacks if a.own_success is not None]
    if evaluation.certificate is not None and evaluation.certificate.sites:
        shares = ", ".join(f"{name} {100 * share:.1f}"
                           for name, share in evaluation.certificate.sites.items())
        lines.append("Intervals that lie within one quantization level, per cent at each quantized "
                     f"activation: {shares}.")
    if evaluation.fidelity:
        values = ", ".join(f"{name} {value:.2f}" for name, value in evaluation.fidelity.items())
        lines.append("Fidelity, the correlation of each gradient with true changes of the margin "
                     f"at a quarter of eps: {values} (near 1 on a sound float model).")
    if evaluation.curve:
        points = ", ".join(f"{point.eps:.4g}: {100 * point.survivors / point.images:.1f}"
                           for point in evaluation.curve)
        lines.append(f"Accuracy over eps, per cent of {_curve_images(evaluation)}, upper bounds: "
                     f"{points}.")
    if evaluation.certificate is not None and evaluation.certificate.skipped:
        lines.append(f"No time was left to certify {evaluation.certificate.skipped} images; they "
                     "count as not certified.")
    if evaluation.skipped:
        lines.append(f"Left out for lack of time: {'; '.join(evaluation.skipped)}.")
    return lines


def _curve_images(evaluation: Evaluation) -> str:
    """Return which images the curve is of; evaluations of older versions used fewer."""
    few = evaluation.curve[0].images
    return f"the same {few} images" if few == evaluation.images else \
        f"the first {few} of {evaluation.images} images"


def raised_flags(evaluation: Evaluation) -> tuple[list[Flag], str]:
    """Return the raised flags, gravest first, and one line for those with too few images.

    The line is empty if there are none of the latter.
    """
    raised = [flag for flag in evaluation.flags if flag.raised]
    few = [flag.name for flag in raised if flag.reason.endswith(TOO_FEW)]
    flags = [flag for kind in ("masked", "unresolved", "undecided") for flag in raised
             if flag.kind == kind and flag.name not in few]
    if not few:
        return flags, ""
    line = (f"too few images to tell: {', '.join(few)}. Evaluate more: with {ENOUGH} survivors "
            "and no hit among them, these checks are clear.")
    n, survivors = evaluation.images, int(evaluation.survived.sum())
    if evaluation.conclusion != "not robust" and 0 < survivors < ENOUGH:
        needed = -(-n * ENOUGH // (50 * survivors)) * 50
        line += f" At {survivors} of {n} survivors, about {needed} images give as many."
    return flags, line


def flag_lines(evaluation: Evaluation) -> list[str]:
    """Return one line for each raised flag, and one for those with too few images."""
    flags, few = raised_flags(evaluation)
    lines = [f"[{flag.kind}] {flag.name}: {flag.reason}" for flag in flags]
    return [*lines, f"[undecided] {few}"] if few else lines


@as_text.register
def evaluation_text(evaluation: Evaluation) -> str:
    """Return an evaluation as text."""
    clean = Cell(int(evaluation.correct.sum()), evaluation.images)
    broken = int(evaluation.correct.sum()) - int(evaluation.survived.sum())
    bounds = UPPER_BOUND if evaluation.certificate is None else BOUNDS
    parts = [headline(evaluation),
             f"Clean accuracy {clean} %; attacks succeed on {broken} of {clean.count} correctly "
             f"classified images. Threat: {evaluation.threat}; seed {evaluation.seed}"
             f"{sample_text(evaluation.sample)}.",
             *_normalisation_hint(evaluation), "", table(attack_rows(evaluation))]
    parts += ["", *side_lines(evaluation)]
    parts += [*flag_lines(evaluation), bounds]
    return "\n".join(parts)


def _normalisation_hint(evaluation: Evaluation) -> list[str]:
    """Return a hint on normalisation if clean accuracy is low."""
    if evaluation.clean_accuracy >= _LOW or evaluation.threat.mean is not None:
        return []
    return ["Clean accuracy is low. Was the model trained on normalised images? Then give their "
            "mean and std (Threat(mean=, std=), --mean, --std)."]


def comparison_rows(comparison: Comparison) -> list[list[str]]:
    """Return one row a model, header first."""
    names = all_columns(comparison)
    rows = [["model", *names, "conclusion", "verdict"]]
    for name, evaluation in comparison.rows.items():
        cells = columns(evaluation)
        rows.append([name, *(str(cells[c]) if c in cells else "-" for c in names),
                     evaluation.conclusion, evaluation.verdict])
    return rows


def paired_lines(comparison: Comparison) -> list[str]:
    """Return one line a pair of models: images that only one of them survives.

    Each model is paired with the first, and later ones with the fine-tuned float model.
    """
    names = list(comparison.rows)
    pairs = [(names[0], other) for other in names[1:]]
    if "float + fine-tune" in names:
        pairs += [("float + fine-tune", other) for other in names[3:]]
    lines = []
    for first, second in pairs:
        a, b, p = comparison.paired(first, second)
        images = "image survives" if b == 1 else "images survive"
        lines.append(f"{second} against {first}: {b} {images} only the former, {a} only the latter "
                     f"(exact McNemar p = {p:.2g})")
    return lines


@as_text.register
def comparison_text(comparison: Comparison) -> str:
    """Return a comparison as text."""
    first = next(iter(comparison.rows.values()))
    parts = [f"Per cent of {first.images} images [95 % interval]. Threat: {first.threat}; "
             f"suite {first.suite}, seed {first.seed}{sample_text(first.sample)}.", "",
             table(comparison_rows(comparison)), ""]
    parts += paired_lines(comparison)
    for name, evaluation in comparison.rows.items():
        parts += [f"{name}: {line}" for line in flag_lines(evaluation)]
    parts += [f"Note: {note}." for note in comparison.notes]
    return "\n".join([*parts, bounds_of(comparison)])
