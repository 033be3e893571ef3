"""The result of a certification: frozen, printable, and the JSON that it reads and writes."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import DataError
from .files import indices, mask_of, read_json, write_text
from .masking import wilson
from .spec import Threat

FORMAT = 1


@dataclass(frozen=True, eq=False)  # arrays have no one truth value
class Certificate:
    """Say which images no attack can break.

    An image is certified where it is classified correctly and the true class's logit is proven
    to stay above every other one on all images that the threat allows, in the float32 function
    that runs: a lower bound of the truth, where attacks give an upper one.

    Attributes:
        certified: (N,) images that no attack within the threat can break.
        correct: (N,) images that are classified correctly.
        lower: (N,) float64, a lower bound of the margin (true logit minus best other) over all
            that the threat allows; minus infinity where nothing is known.
        sites: for each staircase, the share of its inputs' intervals that fall on one step.
        seconds: wall time.
        threat, method, splits, environment: how to have it again.
        image_hash: of pixels and labels, in order, as in ``Evaluation``.
        skipped: images that there was no time for; they count as not certified.
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
        """Return the share of images that are certified: a lower bound of the truth."""
        return float(self.certified.mean())

    @property
    def clean_accuracy(self) -> float:
        """Return the share of images classified correctly."""
        return float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson interval of certified_accuracy; it covers the sampling only."""
        return wilson(int(self.certified.sum()), self.images)

    def __str__(self) -> str:
        from .report import certificate_text
        return certificate_text(self)

    def _repr_html_(self) -> str:
        from .report import certificate_html
        return certificate_html(self)

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
        """Write the JSON that :meth:`load` reads."""
        write_text(path, json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Certificate:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: no such file, or not such JSON.
        """
        return cls.from_dict(read_json(path))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Certificate:
        """Read what :meth:`to_dict` wrote.

        Raises:
            DataError: not such a dictionary, or of another format version.
        """
        try:
            if data["format"] != FORMAT:
                raise DataError(f"certificate JSON of format {data['format']}, expected {FORMAT}")
            n = data["images"]
            certified = mask_of(data["certified_images"], n)
            ends = np.where(certified, math.inf, -math.inf)  # of one class the margin is infinite
            lower = np.array([end if v is None else v
                              for v, end in zip(data["lower"], ends, strict=True)], dtype=float)
            return cls(certified, mask_of(data["correct_images"], n),
                       lower, data["sites"], data["seconds"], Threat(**data["threat"]),
                       data["method"], data["environment"], data["image_hash"], data["skipped"],
                       data.get("splits", 0), data.get("sample"))
        except (KeyError, TypeError, IndexError) as error:
            raise DataError("this is no certificate JSON of quantguard", why=repr(error)) from None
