"""Frozen, validated settings: QuantSpec (a quantizer), InputSpec and Threat (an attacker)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any

from .errors import SpecError

FORMS = ("uniform", "tanh", "sign")
NORMS = ("linf", "l2")
FLOAT_BITS = 32
GREY_LEVELS = 255  # steps between the darkest and the brightest pixel of an 8-bit image
# Relative to the range of the pixels; the L2 radius is usual for images of 3x32x32.
DEFAULT_EPS = {"linf": 8 / 255, "l2": 0.5}
# Bounds with at least this range count grey levels, such as 0..255; others are like 0..1 or -1..1.
_LEVELS_RANGE = 16
# With such bounds, an eps of fewer grey levels was probably meant for pixels of 0..1. In Linf, one
# level is the smallest change of an 8-bit image; L2 radii for pixels of 0..1 go up to 3.
_MIN_LEVELS = {"linf": 1.0, "l2": 4.0}
_UNSET: Any = None


def plain(value: Any) -> Any:
    """Return a scalar of numpy, torch or fractions as a Python number; other values unchanged.

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
    """Settings of the quantizer of one activation.

    Args:
        bits: 1 to 8, or 32 for an activation that stays float.
        dynamic: True: thresholds and step are trained parameters (DQA). False: they are constants
            that calibration sets (FQA).
        per_channel: one set of thresholds per channel instead of one per tensor.
        form: ``uniform``; ``tanh`` for ``round((2^n - 1) tanh x) / (2^n - 1)``; ``sign`` for
            ``+-step/2`` (1 bit). The last two are used by arXiv:1807.06714 and related papers.
        range_factor: factor on the step that calibration finds. Below 1, steps are finer and
            large activations saturate earlier.

    Raises:
        SpecError: a value is out of its range.
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
        """The number of thresholds m: 2^bits - 1, or 2^(bits+1) - 2 in the tanh form."""
        return (1 << (self.bits + 1)) - 2 if self.form == "tanh" else (1 << self.bits) - 1

    @property
    def is_float(self) -> bool:
        """Whether the activation stays float."""
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
    """The attacker: how far each image may be changed, and in which units.

    Args:
        norm: ``linf`` or ``l2``.
        eps: the radius, in the units of ``bounds``. The default is 8/255 of the range of the
            pixels in Linf; in L2 half of the range, which is usual for images of 3x32x32.
        bounds: smallest and largest pixel value.
        mean: per channel; the model's input is ``(pixels - mean) / std``. None: it is the pixels.
        std: per channel, positive.

    Raises:
        SpecError: a value is out of its range, or eps is larger than the range of the pixels, or
            bounds are grey levels (0 to 255) and eps is in units of pixels from 0 to 1.

    Example:
        >>> Threat(eps=8 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)).norm
        'linf'
    """

    norm: str = "linf"
    eps: float = _UNSET
    bounds: tuple[float, float] = (0.0, 1.0)
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise SpecError(f"norm={self.norm!r} is unknown", fix=f"Use one of {', '.join(NORMS)}.")
        bounds = _numbers("bounds", self.bounds)
        if bounds is None or len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise SpecError(f"bounds={self.bounds!r} must be (lowest pixel, highest pixel)")
        width = bounds[1] - bounds[0]
        if self.eps is None:
            object.__setattr__(self, "eps", DEFAULT_EPS[self.norm] * width)
        object.__setattr__(self, "eps", plain(self.eps))
        if not (isinstance(self.eps, (int, float)) and 0 <= self.eps < math.inf):
            raise SpecError(f"eps={self.eps!r} must be a finite number, 0 or more, in pixel units")
        self._check_units(bounds[0], bounds[1])
        mean, std = _numbers("mean", self.mean), _numbers("std", self.std)
        if std is not None and min(std) <= 0:
            raise SpecError(f"std={self.std!r} must be positive")
        if mean is not None and std is not None and len(mean) != len(std):
            raise SpecError(f"mean has {len(mean)} channels and std has {len(std)}")
        object.__setattr__(self, "eps", float(self.eps))
        object.__setattr__(self, "bounds", (bounds[0], bounds[1]))
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    def _check_units(self, low: float, high: float) -> None:
        """Refuse a radius that is in other units than the bounds."""
        width = high - low
        if self.norm == "linf" and self.eps > width:
            meant = self.eps * width / GREY_LEVELS
            raise SpecError(
                f"eps={self.eps:g} is larger than the whole range {low:g}..{high:g}",
                why="eps is in pixel units, those of bounds.",
                fix="Use an eps within the range." if meant > width else
                f"Did you mean eps={meant:.4g} ({self.eps:g}/255"
                + (")" if width == 1 else " of the range)")
                + (", or in Python bounds=(0, 255)?" if width < GREY_LEVELS else "?"))
        levels = self.eps * GREY_LEVELS / width
        if width >= _LEVELS_RANGE and 0 < levels < _MIN_LEVELS[self.norm]:
            raise SpecError(
                f"eps={self.eps:g} is only {levels:.2g} grey levels of pixels from {low:g} to "
                f"{high:g}",
                why="eps is in pixel units, those of bounds.",
                fix=f"Did you mean eps={self.eps * width:.4g} ({self.eps:.4g} of the range)? If "
                    "the small radius is intended, use pixels from 0 to 1: "
                    f"Threat({self.norm!r}, {self.eps / width:.4g}, mean={-low / width + 0:g}, "
                    f"std={1 / width:.6g}).")

    def __str__(self) -> str:
        low, high = self.bounds
        levels = self.eps * GREY_LEVELS / (high - low)
        text = f"{'Linf' if self.norm == 'linf' else 'L2'}, eps {self.eps:.4g} in pixels of " \
               f"{low:g}..{high:g}"
        if self.norm == "linf" and 0 < levels < 0.999:
            text += f" (less than a grey level, {(high - low) / GREY_LEVELS:.4g})"
        elif self.bounds != (0.0, 1.0):
            text += f" ({levels:.4g} of {GREY_LEVELS} grey levels)"
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None:
                text += f", {name} {', '.join(format(v, '.4g') for v in values)}"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON types."""
        return asdict(self)

    def at(self, eps: float) -> Threat:
        """Return the same attacker with another radius, without a check of its size."""
        clone = copy.copy(self)
        object.__setattr__(clone, "eps", float(eps))
        return clone

    def in_pixels_of(self, low: float, high: float) -> Threat:
        """Return the same attacker, for the same model input, with pixels in other bounds."""
        if (low, high) == self.bounds:
            return self
        scale = (high - low) / (self.bounds[1] - self.bounds[0])
        clone = self.at(self.eps * scale)
        mean = tuple((m - self.bounds[0]) * scale + low for m in self.mean or (0.0,))
        std = tuple(s * scale for s in self.std or (1.0,))
        for name, value in (("bounds", (low, high)), ("mean", mean), ("std", std)):
            object.__setattr__(clone, name, value)
        return clone


def check_threat(threat: Any) -> None:
    """Check that threat is a :class:`Threat` and not, for example, a number.

    Raises:
        SpecError: it is not.
    """
    if not isinstance(threat, Threat):
        threat = plain(threat)
        number = isinstance(threat, (int, float))
        raise SpecError(f"threat is {threat!r}, and must be a quantguard.Threat",
                        fix=f"Write Threat(eps={threat:g})." if number else "Write Threat(eps=…).")


def check_seed(seed: Any) -> None:
    """Check that seed is valid for all generators; numpy's takes 32 bits.

    Raises:
        SpecError: it is not an integer from 0 to 2^32 - 1.
    """
    if not isinstance(plain(seed), int) or not 0 <= seed < 1 << 32:
        raise SpecError(f"seed={seed!r} must be an integer from 0 to {(1 << 32) - 1}")


@dataclass(frozen=True)
class InputSpec:
    """Settings of the quantizer on a model's input.

    Args:
        bits: 1 to 8.
        low: lowest level, in units of the model's input; one number or one per channel.
        high: highest level, likewise.

    Raises:
        SpecError: a value is out of its range.
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
                            fix="Pass (low, high), or one such pair per channel.")
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)
