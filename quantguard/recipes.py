"""Recipes of the adversarial fine-tune: their settings, inner attacks and loss terms."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .activation import listening, soften, staircases
from .attacks.pgd import ascend, input_gradient, project
from .errors import SpecError
from .pooling import pools_first
from .running import evaluating, frozen
from .spec import Threat

_DEFAULTS: dict[str, dict[str, Any]] = {
    # Plain fine-tuning, without an attack.
    "clean": {"steps": 0, "rel_step": 0.0, "noise": 0.0, "sharpness": None, "stability": 0.0,
              "range_factor": 1.0},
    # Madry et al. 2018, arXiv:1706.06083, the inner attack through the softened twin.
    "pgd": {"steps": 3, "rel_step": 0.5, "noise": 1.0, "sharpness": (3.0, 8.0, 16.0),
            "stability": 1.0, "range_factor": 0.4},
    # de Jorge et al. 2022, arXiv:2202.01181: noise, one step of eps, no projection. Their noise of
    # 2 eps is for 8/255; at the 0.1 of Fashion-MNIST it cost 2 points of clean accuracy and gained
    # no robust ones.
    "nfgsm": {"steps": 1, "rel_step": 1.0, "noise": 1.0, "sharpness": None, "stability": 0.0,
              "range_factor": 1.0},
}


@dataclass(frozen=True)
class Recipe:
    """Describe one way of fine-tuning; each name has its own defaults, None means those.

    Args:
        name: ``clean``, ``pgd`` or ``nfgsm``.
        lr: peak learning rate of AdamW under a one-cycle schedule; None: from the scale of the
            model's own gradients, so that a large pretrained net is not wrecked.
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

    Raises:
        SpecError: an unknown name, or a value out of its range.

    Example:
        >>> Recipe("pgd").steps, Recipe("nfgsm", lr=1e-3).lr
        (3, 0.001)
    """

    name: str = "pgd"
    lr: float | None = None
    threshold_lr: float = 2e-3
    weight_decay: float = 5e-4
    batch_size: int | None = None
    steps: int | None = None
    rel_step: float | None = None
    noise: float | None = None
    sharpness: tuple[float, ...] | None = None
    stability: float | None = None
    ema: float = 0.995
    range_factor: float | None = None

    def __post_init__(self) -> None:
        if self.name not in _DEFAULTS:
            near = difflib.get_close_matches(self.name, _DEFAULTS, 1, 0.3)
            raise SpecError(f"recipe {self.name!r} is unknown",
                            fix=f"Use one of {', '.join(_DEFAULTS)}"
                            + (f"; did you mean {near[0]!r}?" if near else "."))
        for name, value in _DEFAULTS[self.name].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.sharpness is not None:
            values = self.sharpness if isinstance(self.sharpness, (tuple, list)) else \
                (self.sharpness,)
            try:
                object.__setattr__(self, "sharpness", tuple(float(k) for k in values))
            except (TypeError, ValueError):
                raise SpecError(f"recipe {self.name}: sharpness={self.sharpness!r} must be "
                                "numbers") from None
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise SpecError(f"recipe {self.name}: {name}={value!r} must be an integer")
        for name in ("lr", "threshold_lr", "batch_size", "range_factor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SpecError(f"recipe {self.name}: {name}={value!r} must be positive")
        for name in ("weight_decay", "steps", "rel_step", "noise", "stability"):
            if not getattr(self, name) >= 0:
                raise SpecError(f"recipe {self.name}: {name}={getattr(self, name)!r} must not be "
                                "negative")
        if not 0 <= self.ema < 1:
            raise SpecError(f"recipe {self.name}: ema={self.ema!r} must be in [0, 1)")
        if not all(0 < k < math.inf for k in self.sharpness or ()):
            raise SpecError(f"recipe {self.name}: sharpness={self.sharpness!r} must be positive")

    @property
    def attacks(self) -> bool:
        """Return whether images are attacked in training."""
        return bool(self.steps)

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
            near = difflib.get_close_matches(key, known, 1, 0.3)
            raise SpecError(f"a recipe has no field {key!r}",
                            fix=f"Did you mean {near[0]!r}?" if near else
                            f"Fields: {', '.join(sorted(known))}.")
        try:
            if key == "sharpness":
                values[key] = tuple(float(v) for v in text.split(",") if v)
            elif key in ("steps", "batch_size"):
                values[key] = int(text)
            else:
                values[key] = float(text)
        except ValueError:
            raise SpecError(f"{key}={text!r} is not a number") from None
    return Recipe(recipe, **values)


def craft(model: nn.Module, pixels: Tensor, labels: Tensor, threat: Threat,
          recipe: Recipe) -> Tensor:
    """Return the training images of a batch: attacked ones, or pixels themselves.

    BatchNorm is in eval mode and no parameter gets a gradient while crafting. Random starts come
    from torch's global generator.
    """
    if not recipe.attacks:
        return pixels
    noise, rel_step, steps = recipe.noise or 0.0, recipe.rel_step or 0.0, recipe.steps or 0
    if threat.norm == "linf":
        start = torch.empty_like(pixels).uniform_(-1, 1)
    else:
        start = ascend(torch.randn_like(pixels), "l2") * torch.rand(
            (len(pixels), *[1] * (pixels.dim() - 1)), device=pixels.device)
    x = (pixels + noise * threat.eps * start).clamp(*threat.bounds)
    with evaluating(model), frozen(model):
        for step in range(steps):
            twin: Any = nullcontext()
            if recipe.sharpness:
                twin = soften(model, recipe.sharpness[min(step, len(recipe.sharpness) - 1)])
            with twin, pools_first(model):
                gradient = input_gradient(model, x, labels, "ce")[0]
            x = x + rel_step * threat.eps * ascend(gradient, threat.norm)
            if recipe.name == "nfgsm":
                # projecting would undo the noise that keeps one-step training from collapsing
                x = x.clamp(*threat.bounds)
            else:
                x = project(x, pixels, threat.eps, threat.norm, threat.bounds)
    return x.detach()


@contextmanager
def stability_term(model: nn.Module, weight: float) -> Iterator[Callable[[], Tensor | float]]:
    """Collect how near the thresholds pre-activations are, during a forward inside the context.

    ``mean 4 p (1 - p)``, p = sigma(8 (z - t_i) / step), over elements, thresholds and sites (above
    4 bits of the nearest threshold alone): a pre-activation off every threshold does not change its
    level when the image moves a little.
    """
    terms: list[Tensor] = []
    modules = staircases(model)

    def listener(name: str) -> Callable[[Tensor], None]:
        module = modules[name]

        def listen(z: Tensor) -> None:
            t, step = module.thresholds.detach(), module.step.detach()
            m = t.shape[-1]
            if module.axis is not None:
                z, step = z.movedim(module.axis, -1).flatten(0, -2), step.unsqueeze(0)
            if m <= 15 or module.axis is not None:
                centers: list[Tensor] = list(t.unbind(-1))
            else:  # from one threshold to the next p (1 - p) falls to a thousandth
                centers = [t[torch.bucketize(z.detach(), (t[1:] + t[:-1]) / 2)]]
            total = torch.zeros((), device=z.device)
            for center in centers:
                p = torch.sigmoid((z - center) * (8 / step))
                total = total + (p * (1 - p)).mean()
            terms.append(4 / m * total)
        return listen

    if not weight or not modules:
        yield lambda: 0.0
        return
    with listening(model, {name: listener(name) for name in modules}):
        yield lambda: weight * torch.stack(terms).mean() if terms else 0.0
