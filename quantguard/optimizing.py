"""What the optimizer trains, and the running average of the weights that is returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .activation import GAP_FLOOR, staircases
from .errors import SpecError
from .recipes import Recipe

# A gap this near to its floor, over where it started, has merged as far as it can.
_MERGED = 1.5 * GAP_FLOOR


def parameter_groups(model: nn.Module, recipe: Recipe, lr: float,
                     train: str) -> list[dict[str, Any]]:
    """Return the optimizer's groups: weights, those without decay, and thresholds with steps.

    Raises:
        SpecError: there is nothing to train, or settings of weights and none are trained.
    """
    learned = {id(p): p for m in staircases(model).values() for p in m.parameters(recurse=False)}
    thresholds = [p for p in learned.values() if p.requires_grad]
    if train == "thresholds" and not thresholds:
        raise SpecError("train='thresholds', but the model has no learnable thresholds",
                        why="They are frozen." if learned else
                        "Its staircases are fixed, or it has none.",
                        fix=("Let them train (requires_grad_(True))" if learned else
                             "Use dynamic=True (--dynamic)") + ", or train='all' (--train all).")
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
    """Return the staircases whose learned thresholds have merged, or are no longer finite."""
    found = []
    for name, module in staircases(model).items():
        t = module.thresholds.detach()
        before = module.base[..., 1:] - module.base[..., :-1]
        gaps = t[..., 1:] - t[..., :-1]
        if not bool(t.isfinite().all()) or bool((gaps < _MERGED * before).any()):
            found.append(name)
    return found


class AdamW(torch.optim.AdamW):
    """AdamW; on a CPU in one pass over memory, which is faster.

    That pass reads memory as it lies, so gradients and moments are made to lie as weights do.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        on_cpu = all(p.device.type == "cpu" and p.is_floating_point()
                     for group in groups for p in group["params"])
        super().__init__(groups, betas=betas, fused=on_cpu or None)

    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.grad is not None:
                parameter.grad = _lying_as(parameter, parameter.grad)
        return super().step(closure)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the moments of an earlier run, whose weights may have lain otherwise."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name, value in state.items():
                if value.shape == parameter.shape:
                    state[name] = _lying_as(parameter, value)


def _lying_as(like: Tensor, value: Tensor) -> Tensor:
    """Return value in the memory order of another tensor of its shape."""
    alike = all(a == b for a, b, size in zip(like.stride(), value.stride(), like.shape, strict=True)
                if size > 1)
    return value if alike else torch.empty_like(like).copy_(value)


class Average:
    """Keep an exponential moving average of every floating tensor of a model."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.values = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model as it is now."""
        self.count += 1
        # a young average forgets faster: else it is the start, for 1 / (1 - decay) steps
        decay = min(self.decay, self.count / (self.count + 10)) if self.decay else 0.0
        for name, value in model.state_dict().items():
            kept = self.values[name]
            if value.is_floating_point() and decay:
                kept.lerp_(value, 1 - decay)
            else:
                kept.copy_(value)
