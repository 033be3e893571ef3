"""Recipes: the settings of a fine-tune, checked."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any

from ..core.errors import SpecError
from ..core.specs import FLOAT_BITS, plain
from .recipe_defaults import COMMON_DEFAULTS, DEFAULTS, INITS, PRECISIONS, SMALL_BOX

# Fields by what they hold: integers, lists of numbers, words, numbers.
_INTEGERS, _LISTS = ("steps", "batch_size", "input_bits"), ("sharpness", "bit_schedule", "growth")
_WORDS = ("precision", "init")
_NUMBERS = ("lr", "threshold_lr", "weight_decay", "rel_step", "noise", "stability", "ema",
            "range_factor", "mix", "beta", "awp", "distill", "box")
# Settings that have no meaning where the loss is that of worst-case logits.
_NOT_CERTIFIED = ("stability", "mix", "beta", "awp", "distill")


@dataclass(frozen=True)
class Recipe:
    """Settings of one way of fine-tuning. None means the default of the recipe's name.

    Args:
        name: ``clean``, ``pgd``, ``trades``, ``nfgsm``, or ``ibp``, which is certified training.
        lr: peak learning rate of AdamW under a one-cycle schedule; None: chosen from the scale of
            the model's own gradients, so that a large pretrained net is not destroyed. ``ibp``:
            2e-2, or less if a wide layer has no BatchNorm behind it, falling linearly from 40 % of
            the steps on.
        threshold_lr: peak learning rate of thresholds and steps, relative to the gaps.
        weight_decay: of weights; thresholds, biases and norms have none.
        batch_size: None: that of the loader.
        steps: number of gradient steps of the inner attack.
        rel_step: length of one step, over eps.
        noise: radius of the random start, over eps.
        sharpness: k of the softened model at each step of the inner attack (the last one repeats);
            ``()``: use the ``ramp`` surrogate instead.
        stability: weight of the term that pushes pre-activations away from the thresholds.
        ema: decay of the averaged weights that are returned; 0: return the last weights.
        range_factor: multiplies the step that calibration finds, if harden converts the model.
        mix: share of the clean images' cross-entropy in the loss, 0 to 1; papers in this line of
            work use a half.
        beta: weight of the TRADES term, which the inner attack maximises, too; 0: no such term.
        awp: length of the step against the loss that weights take before the gradient is computed,
            over their own norm (adversarial weight perturbation, Wu et al. 2020,
            arXiv:2004.05884); 0: none.
        distill: share of the loss, 0 to 1, that is the distance to the float parent's answers on
            the clean image (as in Goldblum et al. 2019, arXiv:1905.09747). Above 0, images with the
            label -1 and batches without labels are used for training as well.
        bit_schedule: bits that harden trains before the final ones, each from the weights of the
            stage before; 32 is float. These stages share half of the epochs.
        precision: of the network in training: ``float32``, or ``bfloat16``, which some machines
            multiply faster. Weights, losses, validation and the intervals of ``ibp`` are always
            float32.
        init: ``interval``: harden reinitialises the weights for interval training and places the
            thresholds for them, so everything that the model has learned is lost. It is the default
            of ``ibp``: the intervals of trained weights are so wide that training from them
            certifies less. ``keep``: start from the model's own weights.
        growth: ``ibp``: the shares of all steps between which eps grows from 0 to the threat's.
        box: ``ibp``: the share of the radius that the intervals cover, above 0 to 1. Below 1 they
            lie around an image that an attack has moved by the rest (SABR: Mueller, Eckert,
            Fischer, Vechev 2023, arXiv:2210.04871). Use it if full intervals cost too much clean
            accuracy.
        input_bits: bits of a quantizer on the input, over the pixel range without eps at both ends
            (Linf only); 0: none. An input quantizer that the model already has is not replaced.

    Raises:
        SpecError: an unknown name, or a value out of its range.

    Example:
        >>> Recipe("pgd").steps, Recipe("nfgsm", lr=1e-3).lr
        (3, 0.001)
    """

    name: str = "pgd"
    lr: float | None = None
    threshold_lr: float = 2e-3
    weight_decay: float | None = None
    batch_size: int | None = None
    steps: int | None = None
    rel_step: float | None = None
    noise: float | None = None
    sharpness: tuple[float, ...] | None = None
    stability: float | None = None
    ema: float | None = None
    range_factor: float | None = None
    mix: float = 0.0
    beta: float | None = None
    awp: float = 0.0
    distill: float = 0.0
    bit_schedule: tuple[int, ...] | None = None
    precision: str = "float32"
    init: str | None = None
    growth: tuple[float, float] = (0.05, 0.5)
    box: float = 1.0
    input_bits: int | None = None

    def __post_init__(self) -> None:
        if self.name not in DEFAULTS:
            near = difflib.get_close_matches(self.name, DEFAULTS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise SpecError(f"recipe {self.name!r} is unknown",
                            fix=f"Use one of {', '.join(DEFAULTS)}{hint}")
        for name in _NUMBERS:
            value = plain(getattr(self, name))
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise SpecError(f"recipe {self.name}: {name}={value!r} must be a finite number")
            object.__setattr__(self, name, value)
        if not 0 < self.box <= 1:
            raise SpecError(f"recipe {self.name}: box={self.box!r} must be above 0 and at most 1")
        small = SMALL_BOX if self.certifies and self.box < 1 else {}
        for name, value in (COMMON_DEFAULTS | DEFAULTS[self.name] | small).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.sharpness is not None:
            values = self.sharpness if isinstance(self.sharpness, (tuple, list)) else \
                (self.sharpness,)
            try:
                object.__setattr__(self, "sharpness", tuple(float(plain(k)) for k in values))
            except (TypeError, ValueError):
                raise SpecError(f"recipe {self.name}: sharpness={self.sharpness!r} must be "
                                "numbers") from None
        for name in _INTEGERS:
            value = plain(getattr(self, name))
            object.__setattr__(self, name, value)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise SpecError(f"recipe {self.name}: {name}={value!r} must be an integer")
        for name in ("lr", "threshold_lr", "batch_size", "range_factor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SpecError(f"recipe {self.name}: {name}={value!r} must be positive")
        for name in ("weight_decay", "steps", "rel_step", "noise", "stability", "beta", "awp"):
            if not getattr(self, name) >= 0:
                raise SpecError(f"recipe {self.name}: {name}={getattr(self, name)!r} must not be "
                                "negative")
        if self.ema is None or not 0 <= self.ema < 1:
            raise SpecError(f"recipe {self.name}: ema={self.ema!r} must be in [0, 1)")
        for name in ("mix", "distill"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"recipe {self.name}: {name}={getattr(self, name)!r} must be in "
                                "[0, 1]")
        listed = self.bit_schedule
        bit_schedule = tuple(map(plain, listed if isinstance(listed, (tuple, list)) else (listed,)))
        if not all(isinstance(b, int) and (1 <= b <= 8 or b == FLOAT_BITS) for b in bit_schedule):
            raise SpecError(f"recipe {self.name}: bit_schedule={self.bit_schedule!r} must be bits, "
                            "1 to 8 or 32")
        object.__setattr__(self, "bit_schedule", bit_schedule)
        if self.precision not in PRECISIONS:
            raise SpecError(f"recipe {self.name}: precision={self.precision!r} is unknown",
                            fix=f"Use one of {', '.join(PRECISIONS)}.")
        if not self.steps and self.name in ("pgd", "nfgsm"):
            raise SpecError(f"recipe {self.name} needs an attack, and steps=0",
                            fix="Use recipe clean.")
        if self.beta and not self.steps:
            raise SpecError(f"recipe {self.name}: beta={self.beta!r} needs an attack, and steps=0")
        self._check_certified()
        self._check_used()
        if not all(0 < k < math.inf for k in self.sharpness or ()):
            raise SpecError(f"recipe {self.name}: sharpness={self.sharpness!r} must be positive")

    def _check_certified(self) -> None:
        if self.init not in INITS:
            raise SpecError(f"recipe {self.name}: init={self.init!r} is unknown",
                            fix=f"Use one of {', '.join(INITS)}.")
        try:
            first, last = (float(plain(v)) for v in self.growth)
        except (TypeError, ValueError):
            raise SpecError(f"recipe {self.name}: growth={self.growth!r} must be two numbers"
                            ) from None
        if not 0 <= first <= last <= 1:
            raise SpecError(f"recipe {self.name}: growth={self.growth!r} must ascend from 0 to 1")
        object.__setattr__(self, "growth", (first, last))
        if self.input_bits is not None and not 0 <= self.input_bits <= 8:
            raise SpecError(f"recipe {self.name}: input_bits={self.input_bits} must be 0 to 8")
        wrong = [name for name in _NOT_CERTIFIED if getattr(self, name)] if self.certifies else []
        if wrong:
            raise SpecError(f"recipe ibp has no {', '.join(wrong)}",
                            why="It trains on the worst case within intervals only.")
        if self.certifies and bool(self.steps) != (self.box < 1):
            raise SpecError(f"recipe ibp: steps={self.steps} with box={self.box:g}",
                            why="It needs an attack if, and only if, box is below 1.")
        if self.box < 1 and not self.certifies:
            raise SpecError(f"recipe {self.name} has no box: only ibp uses intervals")

    def _check_used(self) -> None:
        """Refuse settings that this recipe does not use."""
        attack = [n for n in ("steps", "rel_step", "noise", "sharpness") if getattr(self, n)]
        learned = [n for n in ("bit_schedule", "distill") if getattr(self, n)]
        for applies, unused, why in (
                (bool(self.beta and self.mix), "mix",
                 "The loss of TRADES includes the clean images, and beta sets their weight."),
                (self.name == "clean", ", ".join(attack), "It does not attack."),
                (self.init == "interval", ", ".join(learned),
                 "init=interval reinitialises the weights in each stage, so nothing learned by "
                 "stages before, or by the float parent, remains."),
                (not self.certifies and self.growth != Recipe.growth, "growth",
                 "Only the eps of ibp grows."),
                (self.certifies and not self.steps and self.precision == "bfloat16",
                 "precision=bfloat16", "Intervals are float32.")):
            if applies and unused:
                raise SpecError(f"recipe {self.name} has no {unused}", why=why)

    @property
    def attacks(self) -> bool:
        """Whether images are attacked in training."""
        return bool(self.steps)

    @property
    def certifies(self) -> bool:
        """Whether the loss is that of worst-case logits within intervals."""
        return self.name == "ibp"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def recipe_of(recipe: str | Recipe, settings: dict[str, str] | None = None) -> Recipe:
    """Return a recipe from its name and ``KEY=VALUE`` settings as text.

    Raises:
        SpecError: an unknown name or field, or a value that cannot be read.
    """
    if isinstance(recipe, Recipe):
        return recipe
    known = {field.name for field in fields(Recipe)} - {"name"}
    values: dict[str, Any] = {}
    for key, text in (settings or {}).items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.6)
            hint = f"Did you mean {near[0]!r}?" if near else f"Fields: {', '.join(sorted(known))}."
            raise SpecError(f"a recipe has no field {key!r}", fix=hint)
        try:
            if key in _LISTS:
                number = int if key == "bit_schedule" else float
                values[key] = tuple(number(v) for v in text.split(",") if v)
            else:
                kind = str if key in _WORDS else int if key in _INTEGERS else float
                values[key] = kind(text)
        except ValueError:
            raise SpecError(f"{key}={text!r} is not a number") from None
    return Recipe(recipe, **values)
