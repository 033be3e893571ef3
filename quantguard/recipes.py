"""Recipes of the fine-tune: their settings, and which stages they go through."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any

from .errors import SpecError
from .spec import FLOAT_BITS, plain

# Fields that are numbers of something, and those that are several numbers.
_INTEGERS, _LISTS = ("steps", "batch_size", "input_bits"), ("sharpness", "walk", "growth")
_WORDS = ("precision", "init")
_NUMBERS = ("lr", "threshold_lr", "weight_decay", "rel_step", "noise", "stability", "ema",
            "range_factor", "mix", "beta", "awp", "distill", "box")
PRECISIONS, INITS = ("float32", "bfloat16"), ("keep", "interval")
# What makes no sense where the loss is that of worst-case logits.
_NOT_CERTIFIED = ("stability", "mix", "beta", "awp", "distill")
# Inner attack of certified training where intervals do not take the whole radius.
_SMALL_BOX: dict[str, Any] = {"steps": 8, "rel_step": 0.5, "noise": 1.0,
                              "sharpness": (2.0, 4.0, 8.0, 16.0)}

_DEFAULTS: dict[str, dict[str, Any]] = {
    # Plain fine-tuning, without an attack.
    "clean": {"steps": 0, "rel_step": 0.0, "noise": 0.0, "sharpness": None, "stability": 0.0,
              "range_factor": 1.0, "beta": 0.0, "walk": ()},
    # Madry et al. 2018, arXiv:1706.06083, the inner attack through the softened twin. What each
    # setting gave is in benchmarks/hardening.py.
    "pgd": {"steps": 3, "rel_step": 0.5, "noise": 1.0, "sharpness": (2.0, 4.0, 8.0),
            "stability": 1.0, "range_factor": 0.4, "beta": 0.0, "walk": (), "input_bits": 8},
    # Zhang et al. 2019, arXiv:1901.08573, equation 5: clean cross-entropy, and beta times how far
    # an attack moves the answers.
    "trades": {"steps": 3, "rel_step": 0.5, "noise": 1.0, "sharpness": (2.0, 4.0, 8.0),
               "stability": 1.0, "range_factor": 0.4, "beta": 6.0, "walk": (), "input_bits": 8},
    # de Jorge et al. 2022, arXiv:2202.01181: noise, one step of eps, no projection. Their noise of
    # 2 eps is for 8/255; at the 0.1 of Fashion-MNIST it cost 2 points of clean accuracy and gained
    # no robust ones.
    "nfgsm": {"steps": 1, "rel_step": 1.0, "noise": 1.0, "sharpness": None, "stability": 0.0,
              "range_factor": 1.0, "beta": 0.0, "walk": ()},
    # Certified training by intervals (Gowal et al. 2018, arXiv:1810.12715): worst-case logits
    # alone. What each setting gave on Fashion-MNIST is in benchmarks/certify.py.
    "ibp": {"steps": 0, "rel_step": 0.0, "noise": 0.0, "sharpness": None, "stability": 0.0,
            "range_factor": 0.75, "beta": 0.0, "walk": (), "weight_decay": 0.0, "ema": 0.0,
            "init": "interval", "input_bits": 8},
}
_COMMON: dict[str, Any] = {"weight_decay": 5e-4, "ema": 0.995, "init": "keep"}


@dataclass(frozen=True)
class Recipe:
    """Describe one way of fine-tuning; each name has its own defaults, None means those.

    Args:
        name: ``clean``, ``pgd``, ``trades``, ``nfgsm``, or ``ibp``: certified training.
        lr: peak learning rate of AdamW under a one-cycle schedule; None: from the scale of the
            model's own gradients, so that a large pretrained net is not wrecked (``ibp``: 2e-2,
            or less where a wide layer has no BatchNorm behind it, falling linearly from 40 %
            of the steps on).
        threshold_lr: the same for thresholds and steps, relative to the gaps.
        weight_decay: of weights; none on thresholds, biases and norms.
        batch_size: None: the loader's own.
        steps: gradient steps of the inner attack.
        rel_step: length of one, over eps.
        noise: radius of the random start, over eps.
        sharpness: k of the softened twin at each step of the inner attack (the last repeats);
            ``()``: the ``ramp`` surrogate instead.
        stability: weight of the term that keeps pre-activations off the thresholds.
        ema: decay of the averaged weights that are returned; 0: the last weights.
        range_factor: multiplies the step that calibration finds, where harden converts.
        mix: share of the clean images' cross-entropy in the loss, 0 to 1; half is what the source
            paper's lineage trains with.
        beta: weight of TRADES' term, which also is what the inner attack climbs; 0: none.
        awp: length of the step, over the weights' own norm, by which weights are moved against
            the loss before its gradient is taken (adversarial weight perturbation, Wu et al. 2020,
            arXiv:2004.05884); 0: none.
        distill: share of the loss, 0 to 1, that is the distance to what the float parent answers
            on the clean image (as in Goldblum et al. 2019, arXiv:1905.09747); above 0 images whose
            label is -1, or batches without labels, train as well.
        walk: bits that harden trains at first, each from what the one before has learned; 32 is
            float. They share half of the epochs.
        precision: in which the network runs in training: ``float32``, or ``bfloat16``, which some
            machines multiply faster. Weights, losses, what is probed and the intervals of ``ibp``
            are float32 in any case.
        init: ``interval``: harden draws weights anew, as suits intervals, and places thresholds
            for them: what the model has learned before is lost. The default of ``ibp``: trained
            weights make intervals that are so wide that it learns more from nothing. ``keep``:
            the weights stay as they come.
        growth: ``ibp``: the shares of all steps between which eps grows from 0 to the threat's.
        box: ``ibp``: the share of the radius that intervals take, above 0 to 1. Below 1 they lie
            around an image that an attack has moved by the rest (SABR: Mueller, Eckert, Fischer,
            Vechev 2023, arXiv:2210.04871): for where whole intervals cost too much clean accuracy.
        input_bits: bits of a staircase on the input, over what is left of the pixel range where
            eps is cut off at both ends (Linf only); 0: none. An input staircase that is there
            stays.

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
    walk: tuple[int, ...] | None = None
    precision: str = "float32"
    init: str | None = None
    growth: tuple[float, float] = (0.05, 0.5)
    box: float = 1.0
    input_bits: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _DEFAULTS:
            near = difflib.get_close_matches(self.name, _DEFAULTS, 1)
            raise SpecError(f"recipe {self.name!r} is unknown",
                            fix=f"Use one of {', '.join(_DEFAULTS)}"
                            + (f"; did you mean {near[0]!r}?" if near else "."))
        for name in _NUMBERS:
            value = plain(getattr(self, name))
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise SpecError(f"recipe {self.name}: {name}={value!r} must be a finite number")
            object.__setattr__(self, name, value)
        if not 0 < self.box <= 1:
            raise SpecError(f"recipe {self.name}: box={self.box!r} must be above 0, and 1 at most")
        small = _SMALL_BOX if self.certifies and self.box < 1 else {}
        for name, value in (_COMMON | _DEFAULTS[self.name] | small).items():
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
        walk = tuple(map(plain, self.walk if isinstance(self.walk, (tuple, list)) else
                         (self.walk,)))
        if not all(isinstance(b, int) and (1 <= b <= 8 or b == FLOAT_BITS) for b in walk):
            raise SpecError(f"recipe {self.name}: walk={self.walk!r} must be bits, 1 to 8 or 32")
        object.__setattr__(self, "walk", walk)
        if self.precision not in PRECISIONS:
            raise SpecError(f"recipe {self.name}: precision={self.precision!r} is unknown",
                            fix=f"Use one of {', '.join(PRECISIONS)}.")
        if not self.steps and self.name in ("pgd", "nfgsm"):
            raise SpecError(f"recipe {self.name} attacks, and steps=0", fix="Use recipe clean.")
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
                            why="It trains on the worst case within intervals alone.")
        if self.certifies and bool(self.steps) != (self.box < 1):
            raise SpecError(f"recipe ibp: steps={self.steps} with box={self.box:g}",
                            why="An attack goes where intervals leave room for it: box below 1.")
        if self.box < 1 and not self.certifies:
            raise SpecError(f"recipe {self.name} has no box: it has no intervals")

    def _check_used(self) -> None:
        """Refuse settings that this recipe would not look at."""
        for unused, why in (
                (bool(self.beta and self.mix) and "mix", "TRADES' loss has the clean images' in "
                 "it, and beta says how much they count."),
                (self.name == "clean" and ", ".join(
                    n for n in ("steps", "rel_step", "noise", "sharpness") if getattr(self, n)),
                 "It attacks nothing."),
                (self.init == "interval" and ", ".join(n for n in ("walk", "distill")
                                                       if getattr(self, n)),
                 "init=interval draws weights anew in each stage: nothing that was learned "
                 "before is left, of the float parent neither."),
                (not self.certifies and self.growth != Recipe.growth and "growth",
                 "Only ibp's eps grows."),
                (self.certifies and not self.steps and self.precision == "bfloat16"
                 and "precision=bfloat16", "Intervals are float32.")):
            if unused:
                raise SpecError(f"recipe {self.name} has no {unused}", why=why)

    @property
    def attacks(self) -> bool:
        """Return whether images are attacked in training."""
        return bool(self.steps)

    @property
    def certifies(self) -> bool:
        """Return whether the loss is that of worst-case logits within intervals."""
        return self.name == "ibp"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def recipe_of(recipe: str | Recipe, settings: dict[str, str] | None = None) -> Recipe:
    """Return a recipe from its name and ``KEY=VALUE`` settings as text.

    Raises:
        SpecError: an unknown name, field, or a value that is none.
    """
    if isinstance(recipe, Recipe):
        return recipe
    known = {field.name for field in fields(Recipe)} - {"name"}
    values: dict[str, Any] = {}
    for key, text in (settings or {}).items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.6)
            raise SpecError(f"a recipe has no field {key!r}",
                            fix=f"Did you mean {near[0]!r}?" if near else
                            f"Fields: {', '.join(sorted(known))}.")
        try:
            if key in _LISTS:
                kind = int if key == "walk" else float
                values[key] = tuple(kind(v) for v in text.split(",") if v)
            else:
                values[key] = text if key in _WORDS else \
                    int(text) if key in _INTEGERS else float(text)
        except ValueError:
            raise SpecError(f"{key}={text!r} is not a number") from None
    return Recipe(recipe, **values)


def stages(recipe: Recipe, bits: int, epochs: int) -> list[tuple[int, int]]:
    """Return (bits, epochs) of every stage, the last of which has at least half of the epochs.

    Where epochs are few, the first bits of the walk are what is left out.
    """
    before = [b for b in recipe.walk or () if b > bits]
    before = before[max(0, len(before) - epochs // 2):] if epochs > 1 else []
    each = max(1, epochs // (2 * len(before))) if before else 0
    return [*((b, each) for b in before), (bits, epochs - each * len(before))]
