"""The Foolbox model that attacks run on, and the way from it back to the nn.Module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConversionError, SpecError
from ..core.nested_tensors import device_of
from ..core.specs import Threat
from .base import fb
from .losses import gradient_in
from .pixel_model import PixelModel


class _Guarded(torch.autograd.Function):
    """Logits whose gradient in the pixels is zero where torch has none."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, model: PixelModel) -> Tensor:
        ctx.model = model
        with torch.enable_grad():
            ctx.leaf = pixels.detach().requires_grad_()
            ctx.logits = model(ctx.leaf)
        return ctx.logits.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return gradient_in(ctx.leaf, ctx.logits, ctx.model, grads[0]), None


def guarded(model: PixelModel, pixels: Tensor) -> Tensor:
    """Return a model's logits for an attack that calls autograd itself, as Foolbox's do."""
    if not (pixels.requires_grad and torch.is_grad_enabled()):
        return model(pixels)  # type: ignore[no-any-return]
    return _Guarded.apply(pixels, model)  # type: ignore[no-any-return]


class _GuardedModel(nn.Module):
    """Module that computes :func:`guarded` logits."""

    def __init__(self, model: PixelModel) -> None:
        super().__init__()
        self.model, self.training = model, model.training

    def forward(self, pixels: Tensor) -> Tensor:
        return guarded(self.model, pixels)


class FoolboxModel(fb.models.PyTorchModel):
    """Foolbox model that gives our attacks access to the nn.Module, as ``.module``.

    Unlike ``foolbox.PyTorchModel`` it leaves the model on its device. Works with every Foolbox
    attack. Put the model in eval mode first.

    Args:
        model: a user's model, or a :class:`PixelModel`.
        threat: bounds, mean and std.
    """

    def __init__(self, model: nn.Module, threat: Threat = Threat()) -> None:
        self.module = model if isinstance(model, PixelModel) else PixelModel(model, threat)
        super().__init__(_GuardedModel(self.module), bounds=threat.bounds, device=device_of(model))


def labels_of(criterion: Any) -> Tensor:
    """Return the labels (N,) that an untargeted attack leads away from.

    Raises:
        SpecError: another criterion.
    """
    wanted = fb.attacks.base.get_criterion(criterion)
    if not isinstance(wanted, fb.criteria.Misclassification):
        raise SpecError(f"this attack is untargeted, and {type(wanted).__name__} is not",
                        fix="Pass labels, or foolbox.criteria.Misclassification.")
    labels: Tensor = wanted.labels.raw
    return labels


def module_of(model: Any) -> PixelModel:
    """Return the nn.Module behind a Foolbox model.

    Raises:
        ConversionError: a plain ``foolbox.PyTorchModel``, which hides its module.
    """
    module = getattr(model, "module", None)
    if not isinstance(module, PixelModel):
        raise ConversionError(
            f"this attack needs the nn.Module, and {type(model).__name__} hides it",
            fix="Wrap the model in quantguard.attacks.FoolboxModel(model, threat).")
    return module
