"""The optimizer: which parameters it trains, AdamW, and the moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import SpecError
from ..nn.quant_activation import GAP_FLOOR, quantizers
from .recipes import Recipe

# Thresholds count as merged if their gap, over its initial size, is this close to its floor.
_MERGED = 1.5 * GAP_FLOOR


def parameter_groups(model: nn.Module, recipe: Recipe, lr: float,
                     train: str) -> list[dict[str, Any]]:
    """Return the optimizer's groups: weights, those without decay, and thresholds with steps.

    Raises:
        SpecError: nothing can be trained, or the recipe sets options of weights and train is
            ``thresholds``.
    """
    learned = {id(p): p for m in quantizers(model).values() for p in m.parameters(recurse=False)}
    thresholds = [p for p in learned.values() if p.requires_grad]
    if train == "thresholds" and not thresholds:
        if learned:
            why, fix = "They are frozen.", "Let them train (requires_grad_(True))"
        else:
            why = "Its quantizers have fixed thresholds, or it has no quantizers."
            fix = "Use dynamic=True (--dynamic)"
        raise SpecError("train='thresholds', but the model has no learnable thresholds",
                        why=why, fix=f"{fix}, or train='all' (--train all).")
    usual = Recipe(recipe.name)
    unused = [name for name in ("lr", "weight_decay", "awp")
              if train == "thresholds" and getattr(recipe, name) != getattr(usual, name)]
    if unused:
        raise SpecError(f"train='thresholds' has no {', '.join(unused)}: weights are not trained",
                        fix="Set threshold_lr, or use train='all' (--train all).")
    weights = [p for p in model.parameters()
               if p.requires_grad and id(p) not in learned and train == "all"]
    groups = [group for group in (
        {"params": [p for p in weights if p.dim() > 1], "lr": lr,
         "weight_decay": recipe.weight_decay},
        {"params": [p for p in weights if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
        {"params": thresholds, "lr": recipe.threshold_lr, "weight_decay": 0.0},
    ) if group["params"]]
    if not groups:
        raise SpecError("nothing to train: every parameter is frozen",
                        fix="Set requires_grad on the parameters that may change.")
    return groups


def merging(model: nn.Module) -> list[str]:
    """Return the quantizers whose learned thresholds have merged, or are no longer finite."""
    found = []
    for name, module in quantizers(model).items():
        t = module.thresholds.detach()
        before = module.base[..., 1:] - module.base[..., :-1]
        gaps = t[..., 1:] - t[..., :-1]
        if not bool(t.isfinite().all()) or bool((gaps < _MERGED * before).any()):
            found.append(name)
    return found


class AdamW(torch.optim.AdamW):
    """AdamW that uses the fused kernel on a CPU, which is faster.

    The fused kernel reads memory in its own order, so gradients and moments are brought into the
    memory layout of their weights.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        on_cpu = all(p.device.type == "cpu" and p.is_floating_point()
                     for group in groups for p in group["params"])
        super().__init__(groups, betas=betas, fused=on_cpu or None)

    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.grad is not None:
                parameter.grad = _in_layout_of(parameter, parameter.grad)
        return super().step(closure)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the moments of an earlier run, whose weights may have had another layout."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name, value in state.items():
                if value.shape == parameter.shape:
                    state[name] = _in_layout_of(parameter, value)


def _in_layout_of(like: Tensor, value: Tensor) -> Tensor:
    """Return value in the memory layout of another tensor of its shape."""
    alike = all(a == b for a, b, size in zip(like.stride(), value.stride(), like.shape, strict=True)
                if size > 1)
    return value if alike else torch.empty_like(like).copy_(value)


class Average:
    """Exponential moving average of every floating-point tensor of a model."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.values = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the model's present tensors."""
        self.count += 1
        # a smaller decay at first: otherwise the start dominates for 1 / (1 - decay) steps
        decay = min(self.decay, self.count / (self.count + 10)) if self.decay else 0.0
        for name, value in model.state_dict().items():
            average = self.values[name]
            if value.is_floating_point() and decay:
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)
