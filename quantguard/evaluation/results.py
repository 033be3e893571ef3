"""Result of an evaluation: frozen, printable, and readable from the JSON that it writes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..certification.certificate import Certificate
from ..core.errors import DataError
from ..core.file_io import indices, mask_of, read_json, replacing, write_text
from ..core.rendering import as_html, as_text
from ..core.specs import Threat
from ..core.statistics import wilson
from . import flags as checks
from .attack_result import AttackResult, CurvePoint
from .flags import Flag

FORMAT = 2


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Robustness of a model, and checks of how far to trust that figure.

    Attributes:
        correct: (N,) images that are classified correctly without an attack.
        survived: (N,) images that survive every attack.
        attacks: results of the attacks, in the order in which they ran.
        flags: checks of the model and of this evaluation.
        adversarials: (N, ...) float32 pixels that broke each image; survivors are unchanged. None
            if the evaluation was read from JSON.
        labels: (N,) true classes.
        threat: norm, eps and bounds of the attacks.
        suite: its name, or ``list``.
        seed: of every random start.
        environment: versions of libraries and the device.
        image_hash: of pixels and labels, in order.
        seconds: wall time.
        fidelity: for each surrogate gradient, its correlation with true differences of the margin
            at eps / 4: 1 is perfect, 0 is useless. Empty if it was not measured.
        curve: accuracy over eps, from 0 up, see :mod:`quantguard.evaluation.eps_curve`.
        skipped: what there was no time for: labels of attacks, points of the curve, checks.
        certificate: which images no attack can break; None if none was asked for.
        sample: which images of a data set these are: ``of`` (its size), ``indices`` and ``seed``
            (None: the first images). None: all images, or the loader's first.
    """

    correct: np.ndarray = field(repr=False)
    survived: np.ndarray = field(repr=False)
    attacks: tuple[AttackResult, ...]
    flags: tuple[Flag, ...]
    adversarials: np.ndarray | None = field(repr=False)
    labels: np.ndarray = field(repr=False)
    threat: Threat
    suite: str
    seed: int
    environment: dict[str, str]
    image_hash: str
    seconds: float
    fidelity: dict[str, float] = field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    skipped: tuple[str, ...] = ()
    certificate: Certificate | None = None
    sample: dict[str, Any] | None = None

    @property
    def images(self) -> int:
        """Return the number of images N."""
        return len(self.correct)

    @property
    def clean_accuracy(self) -> float:
        """Return the share of images that are classified correctly."""
        return float(self.correct.mean())

    @property
    def robust_accuracy(self) -> float:
        """Return the share of images that survive every attack, an upper bound of the truth."""
        return float(self.survived.mean())

    @property
    def clean_interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson interval of clean_accuracy."""
        return wilson(int(self.correct.sum()), self.images)

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson interval of robust_accuracy; it covers the sampling only."""
        return wilson(int(self.survived.sum()), self.images)

    @property
    def verdict(self) -> str:
        """Return ``resolved``, ``undecided`` or ``unresolved``; resolved if nothing survives."""
        open_images = self.survived & ~self.certified
        return checks.verdict(self.flags) if open_images.any() or self.refuted else "resolved"

    @property
    def conclusion(self) -> str:
        """Return the conclusion in one phrase, to be shown beside the figure.

        ``no figure``, ``proven robust``, ``not robust``, ``hidden gradients``, ``not settled`` or
        ``robust as measured``: see :func:`quantguard.evaluation.flags.conclusion`.
        """
        proven = 0 if self.refuted else int(self.certified.sum())
        return checks.conclusion(self.flags, self.images, int(self.correct.sum()),
                                 int(self.survived.sum()), proven, self.verdict)

    @property
    def certified(self) -> np.ndarray:
        """Return (N,) the certified images; none if no certificate was asked for."""
        none = np.zeros(self.images, dtype=bool)
        return none if self.certificate is None else self.certificate.certified

    @property
    def refuted(self) -> bool:
        """Return whether an attack broke a certified image, which makes the certificate void."""
        return bool((self.certified & ~self.survived).any())

    @property
    def bracket(self) -> tuple[float, float]:
        """Return bounds of the truth: the shares of certified images and of survivors."""
        low = 0.0 if self.refuted else float(self.certified.mean())
        return low, self.robust_accuracy

    @property
    def withheld(self) -> tuple[Flag, ...]:
        """Return the flags because of which the evaluation gives no figure."""
        return tuple(flag for flag in self.flags if flag.raised and flag.name in checks.WITHHELD)

    @property
    def reliable(self) -> bool:
        """Return whether the verdict is resolved, however low the figure is.

        See :attr:`conclusion` for the figure itself.
        """
        return self.verdict == "resolved"

    def surviving(self, *groups: str) -> np.ndarray:
        """Return (N,) the correct images that survive every attack of the groups."""
        mask: np.ndarray = self.correct.copy()
        for result in self.attacks:
            if result.group in groups:
                mask &= ~result.broken
        return mask

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the adversarials, as plain JSON types."""
        return {
            "format": FORMAT, "images": self.images, "clean": int(self.correct.sum()),
            "survived": int(self.survived.sum()), "robust_accuracy": self.robust_accuracy,
            "interval": list(self.interval), "verdict": self.verdict,
            "conclusion": self.conclusion,
            "note": "robust_accuracy is an upper bound; the interval covers the sampling only",
            "threat": self.threat.to_dict(), "suite": self.suite, "seed": self.seed,
            "environment": self.environment, "image_hash": self.image_hash,
            "sample": self.sample, "seconds": self.seconds, "labels": self.labels.tolist(),
            "correct_images": indices(self.correct), "survived_images": indices(self.survived),
            "attacks": [{**r.settings, "attacked_images": indices(r.attacked),
                         "broken_images": indices(r.broken), "own_success": r.own_success,
                         "median_norm": r.median_norm, "queries": r.queries,
                         "gradients": r.gradients, "seconds": r.seconds, "error": r.error}
                        for r in self.attacks],
            "flags": [vars(flag) for flag in self.flags], "fidelity": self.fidelity,
            "curve": [vars(point) for point in self.curve], "skipped": list(self.skipped),
            "certificate": None if self.certificate is None else self.certificate.to_dict()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON that :meth:`from_dict` reads."""
        write_text(path, json.dumps(self.to_dict(), indent=1))

    def save_adversarials(self, path: str | os.PathLike[str]) -> None:
        """Write ``x`` (N, ...) pixels, ``y`` (N,) labels and ``broken`` (N,) as one npz file.

        Raises:
            DataError: the evaluation was read from JSON, which has no images.
        """
        if self.adversarials is None:
            raise DataError("this evaluation was read from JSON, which has no adversarials")
        target = Path(path)
        if target.suffix != ".npz":
            raise DataError(f"{target} must end in .npz")
        with replacing(target) as beside:
            np.savez_compressed(beside, x=self.adversarials, y=self.labels,
                                broken=self.correct & ~self.survived)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: no such file, or not such JSON.
        """
        return cls.from_dict(read_json(path))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Evaluation:
        """Read what :meth:`to_dict` wrote.

        Raises:
            DataError: not such a dictionary, or of another format version.
        """
        try:
            if data["format"] == 1:
                data = _of_format_1(data)
            if data["format"] != FORMAT:
                raise DataError(f"evaluation JSON of format {data['format']}, expected {FORMAT}")
            n, certificate = data["images"], data.get("certificate")
            attacks = []
            for row in data["attacks"]:
                row = dict(row)
                attacked, broken = (mask_of(row.pop(k), n)
                                    for k in ("attacked_images", "broken_images"))
                rest = {k: row.pop(k) for k in ("own_success", "median_norm", "queries",
                                                "gradients", "seconds")}
                rest["error"] = row.pop("error", None)
                attacks.append(AttackResult(row, attacked, broken, **rest))
            return cls(mask_of(data["correct_images"], n), mask_of(data["survived_images"], n),
                       tuple(attacks), tuple(Flag(**f) for f in data["flags"]), None,
                       np.array(data["labels"]), Threat(**data["threat"]), data["suite"],
                       data["seed"], data["environment"], data["image_hash"], data["seconds"],
                       data.get("fidelity", {}),
                       tuple(CurvePoint(**point) for point in data.get("curve", ())),
                       tuple(data.get("skipped", ())),
                       None if certificate is None else Certificate.from_dict(certificate),
                       data.get("sample"))
        except KeyError as error:
            if "rows" in data:
                raise DataError("this is the JSON of a comparison, which has several evaluations",
                                fix="Give the JSON of one evaluation (quantguard evaluate --json), "
                                    "or one of the comparison's rows.") from None
            raise DataError("this is no evaluation JSON of quantguard",
                            why=f"It has no {error}.") from None
        except TypeError as error:
            raise DataError("this is no evaluation JSON of quantguard", why=str(error)) from None


# What the first format calls otherwise.
_KEYS_1 = {"broke_images": "broken_images", "twin": "sharpness", "see_through": "bpda",
           "standing": "survivors", "twin k 8": "softened k 8"}


def _of_format_1(data: dict[str, Any]) -> dict[str, Any]:
    """Return what JSON of the first format holds, in the names of this one."""
    def renamed(row: dict[str, Any]) -> dict[str, Any]:
        return {_KEYS_1.get(key, key): value for key, value in row.items()}

    def attack(row: dict[str, Any]) -> dict[str, Any]:
        label = re.sub(r"\btwin(?=-)", "softened", row["label"])
        label = re.sub(r"\btwin\b", "softened model", label)
        return {**renamed(row), "label": label,
                "group": "softened" if row["group"] == "twin" else row["group"],
                "class": "transferred" if row["class"] == "crossed" else row["class"]}
    return {**data, "format": FORMAT, "attacks": [attack(row) for row in data["attacks"]],
            "curve": [renamed(point) for point in data.get("curve", ())],
            "fidelity": renamed(data.get("fidelity", {}))}


def same_images(evaluations: Iterable[Evaluation]) -> None:
    """Check that evaluations to be compared used the same images.

    Raises:
        DataError: they did not.
    """
    if len({e.image_hash for e in evaluations}) > 1:
        raise DataError("the loader gives each model different images",
                        why="It shuffles by a generator of its own.",
                        fix="Give a loader that does not shuffle.")
