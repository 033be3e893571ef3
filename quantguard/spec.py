"""Frozen settings, validated once: QuantSpec (a staircase) and Threat (an attacker)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any

from .errors import SpecError

FORMS = ("uniform", "tanh", "sign")
NORMS = ("linf", "l2")
FLOAT_BITS = 32


def plain(value: Any) -> Any:
    """Return Python's number for a scalar of numpy, torch or fractions; all else as it is.

    Example:
        >>> import numpy, torch
        >>> plain(numpy.int64(3)), plain(torch.tensor(0.5)), plain([1])
        (3, 0.5, [1])
    """
    if type(value) in (bool, int, float):
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item") \
            and not getattr(value, "is_meta", False):
        return (value.detach() if hasattr(value, "detach") else value).item()
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


@dataclass(frozen=True)
class QuantSpec:
    """Describe one staircase.

    Args:
        bits: 1 to 8, or 32 for "stays float".
        dynamic: thresholds and step are parameters that training moves (DQA); otherwise they
            are constants placed by calibration (FQA).
        per_channel: one set of thresholds per channel instead of one per tensor.
        form: ``uniform``; ``tanh`` for ``round((2^n - 1) tanh x) / (2^n - 1)``; ``sign`` for
            ``+-step/2`` (1 bit). The last two are the forms of arXiv:1807.06714's lineage.
        range_factor: multiplies the step that calibration finds; below 1 the steps are finer
            and large activations saturate earlier.

    Raises:
        SpecError: a value out of its range.
    """

    bits: int = 2
    dynamic: bool = False
    per_channel: bool = False
    form: str = "uniform"
    range_factor: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", plain(self.bits))
        object.__setattr__(self, "range_factor", plain(self.range_factor))
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not (
            1 <= self.bits <= 8 or self.bits == FLOAT_BITS
        ):
            raise SpecError(f"bits={self.bits!r} is not possible",
                            fix="Use 1 to 8, or 32 for an activation that stays float.")
        if self.form not in FORMS:
            raise SpecError(f"form={self.form!r} is unknown", fix=f"Use one of {', '.join(FORMS)}.")
        if self.form == "sign" and self.bits != 1:
            raise SpecError(f"form='sign' has one threshold, but bits={self.bits}",
                            fix="Use bits=1, or form='tanh'.")
        if not (isinstance(self.range_factor, (int, float)) and 0 < self.range_factor < math.inf):
            raise SpecError(f"range_factor={self.range_factor!r} must be a positive number")

    @property
    def thresholds(self) -> int:
        """Return the number of thresholds m: 2^bits - 1, or 2^(bits+1) - 2 in the tanh form."""
        return (1 << (self.bits + 1)) - 2 if self.form == "tanh" else (1 << self.bits) - 1

    @property
    def is_float(self) -> bool:
        """Return whether the activation stays float."""
        return self.bits == FLOAT_BITS


def _numbers(name: str, value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    value = plain(value)
    try:
        values = (value,) if isinstance(value, (int, float)) else tuple(value)
        numbers = tuple(float(plain(v)) for v in values)
    except (TypeError, ValueError):
        raise SpecError(f"{name}={value!r} is not a list of numbers") from None
    if not numbers or not all(math.isfinite(v) for v in numbers):
        raise SpecError(f"{name}={value!r} must hold finite numbers, one per channel")
    return numbers


@dataclass(frozen=True)
class Threat:
    """Describe the attacker: how far each image may move, and in which units.

    Args:
        norm: ``linf`` or ``l2``.
        eps: the radius, in pixel units (those of ``bounds``).
        bounds: smallest and largest pixel value.
        mean: per channel; the model eats ``(pixels - mean) / std``. None: it eats pixels.
        std: per channel, positive.

    Raises:
        SpecError: a value out of its range.

    Example:
        >>> Threat(eps=8 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)).norm
        'linf'
    """

    norm: str = "linf"
    eps: float = 8 / 255
    bounds: tuple[float, float] = (0.0, 1.0)
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise SpecError(f"norm={self.norm!r} is unknown", fix=f"Use one of {', '.join(NORMS)}.")
        bounds = _numbers("bounds", self.bounds)
        if bounds is None or len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise SpecError(f"bounds={self.bounds!r} must be (lowest pixel, highest pixel)")
        object.__setattr__(self, "eps", plain(self.eps))
        if not (isinstance(self.eps, (int, float)) and 0 <= self.eps < math.inf):
            raise SpecError(f"eps={self.eps!r} must be a finite number, 0 or more, in pixel units")
        if self.norm == "linf" and self.eps > bounds[1] - bounds[0]:
            raise SpecError(
                f"eps={self.eps:g} is larger than the whole range {bounds[0]:g}..{bounds[1]:g}",
                why="eps is in pixel units, those of bounds.",
                fix=f"Did you mean eps={self.eps / 255:.4g} ({self.eps:g}/255), or "
                    "in Python bounds=(0, 255)?")
        mean, std = _numbers("mean", self.mean), _numbers("std", self.std)
        if std is not None and min(std) <= 0:
            raise SpecError(f"std={self.std!r} must be positive")
        if mean is not None and std is not None and len(mean) != len(std):
            raise SpecError(f"mean has {len(mean)} channels and std has {len(std)}")
        object.__setattr__(self, "eps", float(self.eps))
        object.__setattr__(self, "bounds", (bounds[0], bounds[1]))
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON types."""
        return asdict(self)


def check_threat(threat: Any) -> None:
    """Refuse a number where a threat is meant.

    Raises:
        SpecError: threat is no :class:`Threat`.
    """
    if not isinstance(threat, Threat):
        threat = plain(threat)
        number = isinstance(threat, (int, float))
        raise SpecError(f"threat is {threat!r}, and must be a quantguard.Threat",
                        fix=f"Write Threat(eps={threat:g})." if number else "Write Threat(eps=…).")


def check_seed(seed: Any) -> None:
    """Refuse what not every source of random numbers takes; numpy's takes 32 bits.

    Raises:
        SpecError: seed is no such integer.
    """
    if not isinstance(plain(seed), int) or not 0 <= seed < 1 << 32:
        raise SpecError(f"seed={seed!r} must be an integer from 0 to {(1 << 32) - 1}")


@dataclass(frozen=True)
class InputSpec:
    """Describe the staircase on a model's input.

    Args:
        bits: 1 to 8.
        low, high: the lowest and the highest level, in what the model eats: one number, or one per
            channel.

    Raises:
        SpecError: a value out of its range.
    """

    bits: int
    low: Sequence[float]
    high: Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", plain(self.bits))
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise SpecError(f"input_bits={self.bits!r} must be 1 to 8")
        low, high = _numbers("input_range", self.low), _numbers("input_range", self.high)
        if low is None or high is None or len(low) != len(high) or \
                not all(a < b for a, b in zip(low, high, strict=True)):
            raise SpecError(f"input_range from {self.low!r} to {self.high!r} must ascend",
                            fix="Give (low, high), or one such pair per channel.")
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)
