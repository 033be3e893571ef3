"""Certified training: the loss of the worst case within intervals, its probe, where it starts.

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

from .attacks import PixelModel
from .attacks.losses import fools
from .bounds import Flat, check_faithful
from .errors import DataError, SpecError
from .interval_rules import Interval
from .intervals import around, graph_of, propagate, worst_case
from .probing import PixelBatches, Probed
from .recipes import Recipe
from .running import evaluating, frozen, run, true_float32
from .spec import InputSpec, Threat

_WARM_UP, _FALL = 50, 0.4
# Adam's learning rate: of 1e-3, 3e-3, 1e-2, 2e-2 and 4e-2 the one that certified most.
_LR = 2e-2
# A step over the spread of the weights it moves, where no BatchNorm makes up for it.
_SHARE = 0.3


def check(threat: Threat, train: str) -> None:
    """Refuse what certified training can't do.

    Raises:
        SpecError: another norm than Linf, or thresholds alone.
    """
    if threat.norm != "linf":
        raise SpecError(f"recipe ibp trains against linf, and the threat is {threat.norm}",
                        fix="quantguard.certify certifies L2, too, whatever it was trained for.")
    if train != "all":
        raise SpecError("recipe ibp trains weights, and train='thresholds' leaves them out",
                        why="Intervals need weights that were trained for them.",
                        fix="Use train='all'.")


class CertifiedObjective:
    """Compute the training loss: cross-entropy of worst-case logits.

    Where the recipe's box is below 1, the worst case is that of a smaller ball around an image that
    an attack has moved by the rest of the radius.

    Args:
        model: what is trained; its graph is looked for when the first batch comes.
        threat, recipe: radius, and which part of the steps it grows over.
        low: whether the attack that moves images first climbs in bfloat16; intervals are float32.

    Attributes:
        eps: the present radius, 0 to the threat's.
    """

    def __init__(self, model: PixelModel, threat: Threat, recipe: Recipe,
                 low: bool = False) -> None:
        self.model, self.threat, self.recipe, self.low = model, threat, recipe, low
        self.eps = 0.0
        self.teacher = None
        self._flats: dict[torch.Size, Flat] = {}

    def at(self, progress: float) -> None:
        """Set the radius for a step: progress is the share of all steps that lie before it."""
        first, last = self.recipe.growth
        share = (progress - first) / max(last - first, 1e-9)
        self.eps = self.threat.eps * min(max(share, 0.0), 1.0)

    @property
    def attacker(self) -> Threat:
        """Return what the inner attack may do at the present radius."""
        return self.threat.at((1 - self.recipe.box) * self.eps)

    def intervals(self, pixels: Tensor, eps: float) -> Interval:
        """Return the intervals of the logits over the ball of radius eps around each image."""
        shape = pixels.shape[1:]
        if shape not in self._flats:
            with evaluating(self.model):
                flat = graph_of(self.model.model, self.threat, self.model.key, pixels)
                with torch.no_grad(), true_float32():
                    check_faithful(flat, pixels[:4], self.threat, self.model(pixels[:4]))
            self._flats[shape] = flat
        return propagate(self._flats[shape], around(pixels, eps, self.threat.bounds))

    def __call__(self, x: Tensor, _pixels: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over images; arguments as in :class:`crafting.Objective`."""
        box = self.intervals(x, self.recipe.box * self.eps)
        return F.cross_entropy(worst_case(box, labels), labels)


def certified_probe(objective: CertifiedObjective, val: Iterable[Any] | None,
                    batches: PixelBatches) -> Probed:
    """Return clean accuracy, and what intervals at the threat's full radius leave certain of it.

    In float32 and without any slack for rounding: it chooses the epoch, it is no certificate.
    """
    if val is None:
        return Probed(None, None, 0)
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
    return Probed(clean / total, certain / total, total)


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the learning rate's course: 50 steps of warm-up, then linear to 0 from 40 % on."""
    warm = max(1, min(_WARM_UP, steps // 10))

    def factor(step: int) -> float:
        falling = (steps - step) / (steps * (1 - _FALL))
        return max(0.0, min(1.0, (step + 1) / warm, falling))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def own_lr(model: nn.Module, inputs: Any) -> float:
    """Return the peak learning rate; arguments as in :func:`begin_afresh`.

    A BatchNorm makes up for any step. Without one, steps as large as what a wide layer's weights
    are drawn with leave nothing of them, and what is certified swings from run to run.
    """
    scaled = _normalised_or_last(model, inputs)
    fan_ins = [m.weight[0].numel() for m in model.modules()
               if isinstance(m, (nn.Linear, _ConvNd)) and m not in scaled]
    return min([_LR, *(_SHARE / math.sqrt(n) for n in fan_ins)])


def begin_afresh(model: nn.Module, inputs: Any, seed: int) -> None:
    """Draw all weights anew; biases are 0, BatchNorms as they are when new.

    Layers in front of a BatchNorm, and the last one, from N(0, sqrt(2 pi) / fan-in), so that
    intervals neither grow nor shrink (Shi et al. 2021, section 3.2). Others from N(0, 1 / fan-in):
    staircases take their scale from the data, and beside weights so small Adam's steps are huge.

    Args:
        inputs: a batch as the model takes it, which shows what stands in front of what.
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
    """Return the layers whose output a BatchNorm takes at once, and the one that ran last."""
    put_out: list[tuple[nn.Module, Tensor]] = []
    found: set[nn.Module] = set()

    def ran(module: nn.Module, _: Any, output: Tensor) -> None:
        put_out.append((module, output))

    def norm(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.update(module for module, output in put_out if output is given[0])

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
    return found | {module for module, _ in put_out[-1:]}


def input_of(threat: Threat, bits: int | None) -> InputSpec | None:
    """Return the staircase on the input: from eps to 1 - eps of the pixel range; none in L2.

    What an attacker moves beyond it, at the edges of the range, changes nothing.
    """
    low, high = threat.bounds[0] + threat.eps, threat.bounds[1] - threat.eps
    if not bits or not low < high or threat.norm != "linf":
        return None
    mean, std = tuple(threat.mean or (0.0,)), tuple(threat.std or (1.0,))
    channels = max(len(mean), len(std))
    pairs = list(zip(mean * (channels // len(mean)), std * (channels // len(std)), strict=True))
    return InputSpec(bits, tuple((low - m) / s for m, s in pairs),
                     tuple((high - m) / s for m, s in pairs))
