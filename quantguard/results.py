"""Results of an evaluation: frozen, printable, and the JSON that they read and write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import masking
from .certificate import Certificate
from .errors import DataError
from .files import indices, mask_of, read_json, replacing, write_text
from .masking import Flag, wilson
from .spec import Threat

FORMAT = 1


@dataclass(frozen=True, eq=False)  # arrays have no one truth value
class AttackResult:
    """Hold what one attack did.

    Attributes:
        settings: class and every hyper-parameter.
        attacked: (N,) images it was run on.
        broke: (N,) images it broke within the threat, checked by the model itself.
        own_success, median_norm: a minimum-norm attack's own success before clipping to the
            threat, and its median L2 norm; None for other attacks.
        queries, gradients: images passed forward, and with a gradient.
        seconds: wall time.
        error: what it raised, one line; it attacked no more images than it had been through then.
            None: it ended as it should.
    """

    settings: dict[str, Any]
    attacked: np.ndarray = field(repr=False)
    broke: np.ndarray = field(repr=False)
    own_success: int | None
    median_norm: float | None
    queries: int
    gradients: int
    seconds: float
    error: str | None = None

    @property
    def label(self) -> str:
        """Return the attack's name."""
        return str(self.settings["label"])

    @property
    def group(self) -> str:
        """Return what the attack stands for, see :class:`quantguard.attacks.Entry`."""
        return str(self.settings["group"])


@dataclass(frozen=True)
class CurvePoint:
    """Hold one point of accuracy over eps: how many of the images still stand at it."""

    eps: float
    standing: int
    images: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Say how robust a model is, and how far to trust that.

    Attributes:
        correct: (N,) images that are classified correctly unattacked.
        survived: (N,) images that survive every attack.
        attacks: what each attack did, in the order in which they ran.
        flags: checks of the model and of this evaluation.
        adversarials: (N, ...) float32 pixels: what broke each image, else the image itself.
        labels: (N,) true classes.
        threat, suite, seed, environment: how to have it again.
        image_hash: of pixels and labels, in order.
        seconds: wall time.
        fidelity: for each surrogate gradient, its correlation with true differences of the margin
            at eps / 4: 1 where it tells all, 0 where nothing; empty where it was not measured.
        curve: accuracy over eps, from 0 up, see :mod:`quantguard.curve`.
        skipped: what there was no time for: labels of attacks, points of the curve, checks.
        certificate: which of the images no attack can break, where that was asked for.
        sample: which images of a data set these are: ``of`` how many, at which ``indices``, drawn
            by which ``seed`` (None: the first). None: all, or what the loader gave first.
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
        """Return the share of images classified correctly."""
        return float(self.correct.mean())

    @property
    def robust_accuracy(self) -> float:
        """Return the share of images that survive every attack: an upper bound of the truth."""
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
        """Return ``resolved``, ``undecided`` or ``unresolved``; no survivor left is resolved."""
        open_ = self.survived & ~self.certified
        return masking.verdict(self.flags) if open_.any() or self.refuted else "resolved"

    @property
    def conclusion(self) -> str:
        """Return what to make of it in one phrase, beside which the figure belongs.

        ``no figure``, ``proven robust``, ``not robust``, ``hidden gradients``, ``not settled`` or
        ``robust as measured``: see :func:`quantguard.masking.conclusion`.
        """
        proven = 0 if self.refuted else int(self.certified.sum())
        return masking.conclusion(self.flags, self.images, int(self.correct.sum()),
                                  int(self.survived.sum()), proven, self.verdict)

    @property
    def certified(self) -> np.ndarray:
        """Return (N,) the images that are proven to withstand every attack; none if not asked."""
        none = np.zeros(self.images, dtype=bool)
        return none if self.certificate is None else self.certificate.certified

    @property
    def refuted(self) -> bool:
        """Return whether an attack broke what was certified: then the certificate is void."""
        return bool((self.certified & ~self.survived).any())

    @property
    def bracket(self) -> tuple[float, float]:
        """Return the shares between which the truth is: certified, and surviving every attack."""
        low = 0.0 if self.refuted else float(self.certified.mean())
        return low, self.robust_accuracy

    @property
    def withheld(self) -> tuple[Flag, ...]:
        """Return the flags for which no figure is given: answers that are not the image's own."""
        return tuple(flag for flag in self.flags if flag.raised and flag.name in masking.WITHHELD)

    @property
    def reliable(self) -> bool:
        """Return whether the evaluation found nothing against its own figure: it is resolved.

        That the figure is high is not asked: see :attr:`conclusion`.
        """
        return self.verdict == "resolved"

    def surviving(self, *groups: str) -> np.ndarray:
        """Return (N,) the images that are correct and survive every attack of the groups."""
        mask: np.ndarray = self.correct.copy()
        for result in self.attacks:
            if result.group in groups:
                mask &= ~result.broke
        return mask

    def __str__(self) -> str:
        from .report import evaluation_text
        return evaluation_text(self)

    def _repr_html_(self) -> str:
        from .report import evaluation_html
        return evaluation_html(self)

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
                         "broke_images": indices(r.broke), "own_success": r.own_success,
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
            raise DataError("this evaluation was read from JSON, which holds no adversarials")
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
            if data["format"] != FORMAT:
                raise DataError(f"evaluation JSON of format {data['format']}, expected {FORMAT}")
            n, kept = data["images"], data.get("certificate")
            attacks = []
            for row in data["attacks"]:
                row = dict(row)
                attacked, broke = (mask_of(row.pop(k), n) for k in ("attacked_images",
                                                                  "broke_images"))
                rest = {k: row.pop(k) for k in ("own_success", "median_norm", "queries",
                                                "gradients", "seconds")}
                rest["error"] = row.pop("error", None)
                attacks.append(AttackResult(row, attacked, broke, **rest))
            return cls(mask_of(data["correct_images"], n), mask_of(data["survived_images"], n),
                       tuple(attacks), tuple(Flag(**f) for f in data["flags"]), None,
                       np.array(data["labels"]), Threat(**data["threat"]), data["suite"],
                       data["seed"], data["environment"], data["image_hash"], data["seconds"],
                       data.get("fidelity", {}),
                       tuple(CurvePoint(**point) for point in data.get("curve", ())),
                       tuple(data.get("skipped", ())),
                       None if kept is None else Certificate.from_dict(kept),
                       data.get("sample"))
        except KeyError as error:
            if "rows" in data:
                raise DataError("this is the JSON of a comparison, which holds several",
                                fix="Give that of one evaluation (quantguard evaluate --json), or "
                                    "one of its rows.") from None
            raise DataError("this is no evaluation JSON of quantguard",
                            why=f"It has no {error}.") from None
        except TypeError as error:
            raise DataError("this is no evaluation JSON of quantguard", why=str(error)) from None


def same_images(evaluations: Iterable[Evaluation]) -> None:
    """Refuse to hold evaluations against each other that saw other images.

    Raises:
        DataError: they did.
    """
    if len({e.image_hash for e in evaluations}) > 1:
        raise DataError("the loader gives each model other images",
                        why="It shuffles by a generator of its own.",
                        fix="Give a loader that does not shuffle.")
