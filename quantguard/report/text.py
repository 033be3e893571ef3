"""Results as plain text; the numbers behind the HTML, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..masking import ENOUGH, TOO_FEW, Flag, wilson
from ..progress import duration

if TYPE_CHECKING:
    from ..certificate import Certificate
    from ..pipeline import Comparison
    from ..results import Evaluation

UPPER_BOUND = ("Attacked figures are upper bounds of the truth: a stronger attack can only lower "
               "them.\nIntervals are 95 % Wilson and cover the sampling of images only.")

BOUNDS = ("Attacked figures are upper bounds of the truth: a stronger attack can only lower them; "
          "certified ones are\nlower bounds, for the float32 model that runs. Intervals are 95 % "
          "Wilson and cover the sampling of images only.")

LOWER_BOUND = ("Certified figures are lower bounds of the truth: they hold for the float32 model "
               "that runs.\nIntervals are 95 % Wilson and cover the sampling of images only.")


# Clean accuracy below which the way images are fed is in doubt.
_LOW = 0.5


@dataclass(frozen=True)
class Cell:
    """Hold one figure: a share with its interval."""

    count: int
    n: int

    @property
    def share(self) -> float:
        """Return the share, 0 to 1."""
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson interval."""
        return wilson(self.count, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.1f} [{100 * low:.1f}-{100 * high:.1f}]"


def columns(evaluation: Evaluation) -> dict[str, Cell]:
    """Return the columns of a table: clean, each attack with a figure of its own, worst case."""
    n = evaluation.images

    def cell(mask: np.ndarray) -> Cell:
        return Cell(int(mask.sum()), n)
    result = {"clean": cell(evaluation.correct)}
    for attack in evaluation.attacks:
        if attack.settings.get("everywhere") and attack.error is None:
            result[attack.label] = cell(evaluation.correct & ~attack.broke)
    if evaluation.certificate is not None:
        result["certified"] = cell(evaluation.certified)
    result["worst case"] = cell(evaluation.survived)
    return result


def all_columns(comparison: Comparison) -> list[str]:
    """Return the columns of a comparison: what any row has, in the order of the fullest."""
    each = [list(columns(evaluation)) for evaluation in comparison.rows.values()]
    fullest = max(each, key=len)
    return [*fullest[:-1], *dict.fromkeys(name for names in each for name in names
                                          if name not in fullest), fullest[-1]]


def bounds_of(comparison: Comparison) -> str:
    """Return what kind of bounds a comparison's figures are."""
    certified = any(e.certificate is not None for e in comparison.rows.values())
    return BOUNDS if certified else UPPER_BOUND


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned text, the first being the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
             for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def threat_text(evaluation: Evaluation | Certificate) -> str:
    """Return the attacker in one phrase."""
    return str(evaluation.threat)


def sample_text(result: Evaluation | Certificate) -> str:
    """Return which images of a data set these are, to end a clause; empty if not recorded."""
    if result.sample is None:
        return ""
    which = "the first" if result.sample["seed"] is None else "a seeded sample"
    return f"; images: {which} of {result.sample['of']}"


def headline(evaluation: Evaluation) -> str:
    """Return the one sentence that counts; no figure where the model has none."""
    if evaluation.withheld:
        return "NO FIGURE: " + " ".join(flag.reason for flag in evaluation.withheld)
    figure = bracket_line(evaluation) if evaluation.certificate is not None \
        and not evaluation.refuted else attacked_line(evaluation)
    return f"{evaluation.conclusion.upper()}: {figure} {_settled(evaluation)}{_masked(evaluation)}"


def attacked_line(evaluation: Evaluation) -> str:
    """Return the figure alone: how many survive every attack."""
    cell = Cell(int(evaluation.survived.sum()), evaluation.images)
    low, high = cell.interval
    return (f"Robust accuracy <= {100 * cell.share:.1f} % (95 % interval {100 * low:.1f}-"
            f"{100 * high:.1f}; {cell.count} of {cell.n} images survive every attack).")


def _settled(evaluation: Evaluation) -> str:
    """Return how far the figure is to be trusted, as far as that bears on the conclusion."""
    named = evaluation.verdict.capitalize()
    if evaluation.verdict == "resolved":
        return f"{named}: nothing here speaks against the figure."
    if evaluation.conclusion == "not robust":
        return f"{named}, but a stronger attack can only lower it."
    if evaluation.conclusion == "proven robust":
        return f"{named} above what is proven."
    if evaluation.verdict == "unresolved":
        return f"{named}: the worst case has not been found yet."
    return f"{named}: not enough was looked at to call it the worst case."


def _masked(evaluation: Evaluation) -> str:
    """Return that other evaluations of this model would be fooled, where flags say so."""
    names = [flag.name for flag in evaluation.flags if flag.raised and flag.kind == "masked"]
    return f" The model hides its gradients: {', '.join(names)}." if names else ""


def bracket_line(evaluation: Evaluation) -> str:
    """Return between which figures the truth is: proven from below, attacked from above."""
    n = evaluation.images
    proven, standing = (Cell(int(mask.sum()), n) for mask in (evaluation.certified,
                                                              evaluation.survived))
    low, high = proven.interval[0], standing.interval[1]
    gap = standing.count - proven.count
    return (f"Certified {100 * proven.share:.1f} % <= true robust accuracy <= "
            f"{100 * standing.share:.1f} % attacked ({proven.count} of {n} images are proven to "
            f"withstand every attack, {standing.count} survived them all; 95 % interval of both "
            f"ends {100 * low:.1f}-{100 * high:.1f})." + " Nothing is left open." * (not gap))


def attack_rows(evaluation: Evaluation) -> list[list[str]]:
    """Return one row an attack, header first; what had nothing left to attack shares the last."""
    rows = [["attack", "attacked", "broke", "standing", "gradients/image", "time"]]
    standing = evaluation.correct.copy()
    idle = [a for a in evaluation.attacks if not a.attacked.any() and a.error is None]
    for attack in evaluation.attacks:
        standing &= ~attack.broke
        attacked = int(attack.attacked.sum())
        if not attacked and attack.error is None:
            continue
        per_image = f"{attack.gradients / attacked:.0f}" if attacked else "-"
        label = attack.label if attack.error is None else f"{attack.label}: {attack.error}"
        rows.append([label, str(attacked), str(int(attack.broke.sum())),
                     str(int(standing.sum())), per_image, duration(attack.seconds)])
    if idle:
        label = idle[0].label + f" and {len(idle) - 1} more" * (len(idle) > 1)
        rows.append([f"{label}: all was broken", "0", "0", str(int(standing.sum())), "-",
                     duration(sum(a.seconds for a in idle))])
    return rows


def side_lines(evaluation: Evaluation) -> list[str]:
    """Return what is beside the table: minimum-norm attacks, fidelity, the curve."""
    own = [f"{a.label} by its own measure: succeeds on {a.own_success} of "
           f"{int(a.attacked.sum())} images, median L2 norm "
           f"{'-' if a.median_norm is None else format(a.median_norm, '.3g')}; its column counts "
           "what is left after clipping to the threat."
           for a in evaluation.attacks if a.own_success is not None]
    lines = own
    if evaluation.certificate is not None and evaluation.certificate.sites:
        said = ", ".join(f"{name} {100 * share:.1f}"
                         for name, share in evaluation.certificate.sites.items())
        lines.append(f"Per cent of each staircase's intervals that fall on one step: {said}.")
    if evaluation.fidelity:
        said = ", ".join(f"{name} {value:.2f}" for name, value in evaluation.fidelity.items())
        lines.append("Fidelity, the correlation of each gradient with what the margin really does "
                     f"at a quarter of eps: {said} (near 1 on a sound float model).")
    if evaluation.curve:
        said = ", ".join(f"{point.eps:.4g}: {100 * point.standing / point.images:.1f}"
                         for point in evaluation.curve)
        lines.append(f"Accuracy over eps, per cent of {_drawn(evaluation)}, upper bounds: {said}.")
    if evaluation.certificate is not None and evaluation.certificate.skipped:
        lines.append(f"No time was left to certify {evaluation.certificate.skipped} images; they "
                     "count as not certified.")
    if evaluation.skipped:
        lines.append(f"Left out for lack of time: {'; '.join(evaluation.skipped)}.")
    return lines


def _drawn(evaluation: Evaluation) -> str:
    """Return of which images the curve is: an evaluation of an older version has fewer."""
    few = evaluation.curve[0].images
    return f"the same {few} images" if few == evaluation.images else \
        f"the first {few} of {evaluation.images} images"


def spoken(evaluation: Evaluation) -> tuple[list[Flag], str]:
    """Return the raised flags, the gravest first, and one line for all that have too few images."""
    raised = [flag for flag in evaluation.flags if flag.raised]
    few = [flag.name for flag in raised if flag.reason.endswith(TOO_FEW)]
    flags = [flag for kind in ("masked", "unresolved", "undecided") for flag in raised
             if flag.kind == kind and flag.name not in few]
    n, survivors = evaluation.images, int(evaluation.survived.sum())
    asked = "" if evaluation.conclusion == "not robust" else \
        f" Where {survivors} of {n} survive, some {-(-n * ENOUGH // (50 * survivors)) * 50} " \
            "images have as many." if 0 < survivors < ENOUGH else ""
    return flags, (f"too few images to tell: {', '.join(few)}. Evaluate more: with {ENOUGH} "
                   f"survivors, and nothing found on any, it is clear.{asked}") * bool(few)


def flag_lines(evaluation: Evaluation) -> list[str]:
    """Return one line for each flag that speaks, and one for those that cannot tell."""
    flags, few = spoken(evaluation)
    return [*(f"[{flag.kind}] {flag.name}: {flag.reason}" for flag in flags),
            *[f"[undecided] {few}"] * bool(few)]


def evaluation_text(evaluation: Evaluation) -> str:
    """Return an evaluation as text."""
    clean = Cell(int(evaluation.correct.sum()), evaluation.images)
    broken = int(evaluation.correct.sum()) - int(evaluation.survived.sum())
    bounds = UPPER_BOUND if evaluation.certificate is None else BOUNDS
    parts = [headline(evaluation),
             f"Clean accuracy {clean} %; attacks succeed on {broken} of {clean.count} correctly "
             f"classified images. Threat: {threat_text(evaluation)}; seed {evaluation.seed}"
             f"{sample_text(evaluation)}.",
             *_doubts(evaluation), "", table(attack_rows(evaluation))]
    parts += ["", *side_lines(evaluation)]
    parts += [*flag_lines(evaluation), bounds]
    return "\n".join(parts)


def _doubts(evaluation: Evaluation) -> list[str]:
    """Return what to look at where a model is right about few images before any attack."""
    if evaluation.clean_accuracy >= _LOW or evaluation.threat.mean is not None:
        return []
    return ["Clean accuracy is low. Was the model trained on normalised images? Then give their "
            "mean and std (Threat(mean=, std=), --mean, --std)."]


def certificate_text(certificate: Certificate) -> str:
    """Return a certificate as text."""
    cell = Cell(int(certificate.certified.sum()), certificate.images)
    low, high = cell.interval
    lines = [f"Robust accuracy >= {100 * cell.share:.1f} % (95 % interval {100 * low:.1f}-"
             f"{100 * high:.1f}; {cell.count} of {cell.n} images are proven to withstand every "
             "attack).",
             f"Clean accuracy {Cell(int(certificate.correct.sum()), cell.n)} %. Threat: "
             f"{threat_text(certificate)}; method {certificate.method}, "
             f"{duration(certificate.seconds)}{sample_text(certificate)}."]
    if certificate.skipped:
        lines.append(f"{certificate.skipped} images were left out for lack of time and count as "
                     "not certified.")
    if certificate.sites:
        rows = [["staircase", "intervals on one step"],
                *([name, f"{100 * share:.1f} %"] for name, share in certificate.sites.items())]
        lines += ["", table(rows), ""]
    return "\n".join([*lines, LOWER_BOUND])


def comparison_rows(comparison: Comparison) -> list[list[str]]:
    """Return one row a model, header first."""
    names = all_columns(comparison)
    rows = [["model", *names, "verdict", "settled"]]
    for name, evaluation in comparison.rows.items():
        cells = columns(evaluation)
        rows.append([name, *(str(cells[c]) if c in cells else "-" for c in names),
                     evaluation.conclusion, evaluation.verdict])
    return rows


def paired_lines(comparison: Comparison) -> list[str]:
    """Return each later row against the first, image by image."""
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


def comparison_text(comparison: Comparison) -> str:
    """Return a comparison as text."""
    first = next(iter(comparison.rows.values()))
    parts = [f"Per cent of {first.images} images [95 % interval]. Threat: {threat_text(first)}; "
             f"suite {first.suite}, seed {first.seed}{sample_text(first)}.", "",
             table(comparison_rows(comparison)), ""]
    parts += paired_lines(comparison)
    for name, evaluation in comparison.rows.items():
        parts += [f"{name}: {line}" for line in flag_lines(evaluation)]
    parts += [f"Note: {note}." for note in comparison.notes]
    return "\n".join([*parts, bounds_of(comparison)])
