"""Certified training: the loss of the worst-case logits, its validation and initialisation.

Gowal et al. 2018, arXiv:1810.12715; BatchNorm and initialisation as in Shi et al. 2021,
arXiv:2103.17268.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..attacks import PixelModel
from ..attacks.losses import fools
from ..certification.graph.graph import ModelGraph
from ..certification.propagation import check_faithful
from ..certification.rules.training import TrainInterval
from ..certification.training_propagation import around, graph_of, propagate, worst_case
from ..core.errors import DataError, SpecError
from ..core.model_calls import run
from ..core.module_utils import evaluating, frozen
from ..core.runtime import true_float32
from ..core.specs import InputSpec, Threat
from .pixel_batches import PixelBatches
from .recipes import Recipe
from .validation import Validation

# Steps of warm-up, and the share of all steps after which the learning rate falls.
_WARM_UP, _FALL = 50, 0.4
# Adam's learning rate: of 1e-3, 3e-3, 1e-2, 2e-2 and 4e-2 this one certified most.
_LR = 2e-2
# Largest step, over the standard deviation of the weights, for a layer without BatchNorm.
_SHARE = 0.3


def check_certified(threat: Threat, train: str) -> None:
    """Refuse settings that certified training does not support.

    Raises:
        SpecError: a norm other than Linf, or training of thresholds only.
    """
    if threat.norm != "linf":
        raise SpecError(f"recipe ibp trains against linf, and the threat is {threat.norm}",
                        fix="Train with another recipe: quantguard.certify certifies L2 for any "
                            "model.")
    if train != "all":
        raise SpecError("recipe ibp trains weights, and train='thresholds' leaves them out",
                        why="Intervals need weights that were trained for them.",
                        fix="Use train='all'.")


class CertifiedObjective:
    """The training loss of certified training: cross-entropy of the worst-case logits.

    If the recipe's box is below 1, the worst case is that of a smaller ball around an image that an
    attack has moved by the rest of the radius.

    Args:
        model: the model that is trained; its graph is built for the first batch of each shape.
        threat, recipe: the radius, and the steps over which it grows.
        low: whether the inner attack runs in bfloat16; intervals are float32.

    Attributes:
        eps: the present radius, from 0 to the threat's.
    """

    def __init__(self, model: PixelModel, threat: Threat, recipe: Recipe,
                 low: bool = False) -> None:
        self.model, self.threat, self.recipe, self.low = model, threat, recipe, low
        self.eps = 0.0
        self.teacher = None
        self._graphs: dict[torch.Size, ModelGraph] = {}

    def at(self, progress: float) -> None:
        """Set the radius of a step; progress is the share of all steps before it."""
        first, last = self.recipe.growth
        share = (progress - first) / max(last - first, 1e-9)
        self.eps = self.threat.eps * min(max(share, 0.0), 1.0)

    @property
    def attacker(self) -> Threat:
        """The threat of the inner attack at the present radius."""
        return self.threat.at((1 - self.recipe.box) * self.eps)

    def intervals(self, pixels: Tensor, eps: float) -> TrainInterval:
        """Return the intervals of the logits over the ball of radius eps around each image."""
        shape = pixels.shape[1:]
        if shape not in self._graphs:
            with evaluating(self.model):
                graph = graph_of(self.model.model, self.threat, self.model.key, pixels)
                with torch.no_grad(), true_float32():
                    check_faithful(graph, pixels[:4], self.threat, self.model(pixels[:4]))
            self._graphs[shape] = graph
        return propagate(self._graphs[shape], around(pixels, eps, self.threat.bounds))

    def __call__(self, x: Tensor, _pixels: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over images; arguments as in :class:`.objectives.Objective`."""
        logits = self.intervals(x, self.recipe.box * self.eps)
        return F.cross_entropy(worst_case(logits, labels), labels)


def certified_validation(objective: CertifiedObjective, val: Iterable[Any] | None,
                         batches: PixelBatches) -> Validation:
    """Return clean accuracy, and the accuracy that intervals prove at the threat's full radius.

    It chooses the best epoch and is not a certificate: float32, without slack for rounding.

    Raises:
        DataError: val has no batch.
    """
    if val is None:
        return Validation(None, None, 0)
    clean = certain = total = 0
    model = objective.model
    with evaluating(model), frozen(model), torch.no_grad():
        for number, batch in enumerate(val):
            x, y = batches(batch, number, "val")
            right = ~fools(model(x), y)
            worst = worst_case(objective.intervals(x, objective.threat.eps), y)
            worst = worst.scatter(1, y.unsqueeze(1), -math.inf)
            clean += int(right.sum())
            certain += int((right & (worst.amax(1) < 0)).sum())
            total += len(x)
    if not total:
        raise DataError("val is empty", fix="Give at least one batch, or leave val= out.")
    return Validation(clean / total, certain / total, total)


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the learning-rate schedule: 50 steps of warm-up, and linear to 0 from 40 % on."""
    warm = max(1, min(_WARM_UP, steps // 10))

    def factor(step: int) -> float:
        falling = (steps - step) / (steps * (1 - _FALL))
        return max(0.0, min(1.0, (step + 1) / warm, falling))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def own_lr(model: nn.Module, inputs: Any) -> float:
    """Return the peak learning rate of certified training.

    A BatchNorm compensates for large steps. Without one, steps as large as the initial weights of a
    wide layer overwrite them, and the certified accuracy varies widely from run to run.

    Args:
        inputs: a batch as the model takes it.
    """
    scaled = _normalised_or_last(model, inputs)
    fan_ins = [m.weight[0].numel() for m in model.modules()
               if isinstance(m, (nn.Linear, _ConvNd)) and m not in scaled]
    return min([_LR, *(_SHARE / math.sqrt(n) for n in fan_ins)])


def begin_afresh(model: nn.Module, inputs: Any, seed: int) -> None:
    """Reinitialise all weights for interval training; biases are 0, BatchNorms are reset.

    Layers in front of a BatchNorm, and the last layer, get N(0, sqrt(2 pi) / fan-in), so that
    intervals neither grow nor shrink (Shi et al. 2021, section 3.2). Other layers get
    N(0, 1 / fan-in): quantizers take their scale from the data, and Adam's steps would be huge
    compared with smaller weights.

    Args:
        inputs: a batch as the model takes it; it shows which layer is followed by a BatchNorm.
    """
    generator = torch.Generator().manual_seed(seed)
    small = _normalised_or_last(model, inputs)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, _ConvNd)):
                fan_in = module.weight[0].numel()
                scale = math.sqrt(2 * math.pi) / fan_in if module in small else fan_in ** -0.5
                fresh = torch.randn(module.weight.shape, generator=generator) * scale
                module.weight.copy_(fresh)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, _BatchNorm):
                module.reset_parameters()


def _normalised_or_last(model: nn.Module, inputs: Any) -> set[nn.Module]:
    """Return the layers whose output goes straight into a BatchNorm, and the last layer."""
    outputs: list[tuple[nn.Module, Tensor]] = []
    found: set[nn.Module] = set()

    def ran(module: nn.Module, _: Any, output: Tensor) -> None:
        outputs.append((module, output))

    def norm(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.update(module for module, output in outputs if output is args[0])

    handles = [m.register_forward_hook(ran) for m in model.modules()
               if isinstance(m, (nn.Linear, _ConvNd))]
    handles += [m.register_forward_pre_hook(norm) for m in model.modules()
                if isinstance(m, _BatchNorm)]
    try:
        with evaluating(model), torch.no_grad():
            run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found | {module for module, _ in outputs[-1:]}


def input_of(threat: Threat, bits: int | None) -> InputSpec | None:
    """Return the input quantizer, from eps to 1 - eps of the pixel range; None in L2.

    An attack that moves a pixel outside this range, at either end, changes nothing.
    """
    low, high = threat.bounds[0] + threat.eps, threat.bounds[1] - threat.eps
    if not bits or not low < high or threat.norm != "linf":
        return None
    mean, std = tuple(threat.mean or (0.0,)), tuple(threat.std or (1.0,))
    channels = max(len(mean), len(std))
    pairs = list(zip(mean * (channels // len(mean)), std * (channels // len(std)), strict=True))
    return InputSpec(bits, tuple((low - m) / s for m, s in pairs),
                     tuple((high - m) / s for m, s in pairs))
