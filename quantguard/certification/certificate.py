"""Result of a certification: frozen, printable, saved as JSON."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.errors import DataError
from ..core.file_io import indices, mask_of, read_json, write_text
from ..core.rendering import as_html, as_text
from ..core.specs import Threat
from ..core.statistics import wilson

FORMAT = 1


@dataclass(frozen=True, eq=False)  # arrays have no one truth value
class Certificate:
    """Result of :func:`quantguard.certify`: which images are proven robust.

    An image is certified if it is classified correctly and the true class's logit is proven to stay
    above every other logit on all images that the threat allows, in the float32 function that runs.
    The certified accuracy is a lower bound of the true robust accuracy; attacks give an upper one.

    Attributes:
        certified: (N,) images that no attack within the threat can break.
        correct: (N,) images that are classified correctly.
        lower: (N,) float64, a lower bound of the margin (true logit minus best other) over all
            images that the threat allows; minus infinity where nothing is known.
        sites: for each quantizer, the share of its inputs' intervals that fall on one level.
        seconds: wall time.
        threat, method, splits, environment: what is needed to reproduce it.
        image_hash: hash of pixels and labels, in order, as in ``Evaluation``.
        skipped: number of images left out for lack of time; they count as not certified.
        sample: which images of a data set these are, as in ``Evaluation``.
    """

    certified: np.ndarray = field(repr=False)
    correct: np.ndarray = field(repr=False)
    lower: np.ndarray = field(repr=False)
    sites: dict[str, float]
    seconds: float
    threat: Threat
    method: str
    environment: dict[str, str]
    image_hash: str
    skipped: int = 0
    splits: int = 0
    sample: dict[str, Any] | None = None

    @property
    def images(self) -> int:
        """Return the number of images N."""
        return len(self.correct)

    @property
    def certified_accuracy(self) -> float:
        """Return the share of images that are certified: a lower bound of the robust accuracy."""
        return float(self.certified.mean())

    @property
    def clean_accuracy(self) -> float:
        """Return the share of images classified correctly."""
        return float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson interval of certified_accuracy; it covers sampling only."""
        return wilson(int(self.certified.sum()), self.images)

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {
            "format": FORMAT, "images": self.images, "clean": int(self.correct.sum()),
            "certified": int(self.certified.sum()),
            "certified_accuracy": self.certified_accuracy, "interval": list(self.interval),
            "note": "certified_accuracy is a lower bound; the interval covers the sampling only",
            "threat": self.threat.to_dict(), "method": self.method,
            "splits": self.splits, "sites": self.sites,
            "environment": self.environment, "image_hash": self.image_hash,
            "sample": self.sample, "seconds": self.seconds, "skipped": self.skipped,
            "correct_images": indices(self.correct),
            "certified_images": indices(self.certified),
            "lower": [v if math.isfinite(v) else None for v in self.lower.tolist()]}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, which :meth:`load` reads."""
        write_text(path, json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Certificate:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: the file is missing, or is not the JSON of a certificate.
        """
        return cls.from_dict(read_json(path))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Certificate:
        """Read what :meth:`to_dict` wrote.

        Raises:
            DataError: the dictionary is not that of a certificate, or of another format version.
        """
        try:
            if data["format"] != FORMAT:
                raise DataError(f"certificate JSON of format {data['format']}, expected {FORMAT}")
            n = data["images"]
            certified = mask_of(data["certified_images"], n)
            ends = np.where(certified, math.inf, -math.inf)  # with one class the margin is infinite
            lower = np.array([end if v is None else v
                              for v, end in zip(data["lower"], ends, strict=True)], dtype=float)
            return cls(certified, mask_of(data["correct_images"], n),
                       lower, data["sites"], data["seconds"], Threat(**data["threat"]),
                       data["method"], data["environment"], data["image_hash"], data["skipped"],
                       data.get("splits", 0), data.get("sample"))
        except (KeyError, TypeError, IndexError) as error:
            raise DataError("this is not a certificate JSON of quantguard",
                            why=repr(error)) from None
