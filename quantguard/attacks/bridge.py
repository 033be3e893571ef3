"""Bridge between a user's model and Foolbox: pixels in, logits out, no trace left behind."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..activation import staircases
from ..batches import from_pixels
from ..contexts import soften
from ..errors import ConversionError, SpecError
from ..fewchannels import FewChannels
from ..layout import channels_last, is_compiled, takes_channels_last
from ..pooling import pools_first
from ..running import (
    buffers_kept,
    checkpoints_inlined,
    described,
    device_of,
    eaten_by,
    first_line,
    out_of_memory,
    picked,
)
from ..spec import Threat
from ..step_sites import Site, find_sites
from ..straight import has_foreign_steps, straight_through
from ._foolbox import fb
from .losses import decided, gradient_in

# Images in which foreign quantizers are looked for: as many as make so many pixels.
_LOOKED_AT, _LEAST_LOOKED_AT, _PIXELS = 64, 4, 2**18


def logits_of(output: Any) -> Tensor:
    """Return the logits (N, classes) of whatever a classifier returns.

    Raises:
        ConversionError: no (N, classes) tensor in it.
    """
    logits = picked(output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ConversionError(
            f"the model returns {described(output)} where logits (N, classes) are needed",
            fix="Return a tensor, a dict with 'logits' or with nothing else, or a tuple that "
                "starts with them.")
    return logits


class PixelModel(nn.Module):
    """Compute a model's logits from pixels, counting the images that pass.

    Args:
        model: the user's model, which eats ``(pixels - mean) / std``.
        threat: bounds, mean and std.
        key: the keyword under which the model eats images; None: its first argument.

    Attributes:
        probabilities: whether the model puts out a softmax, whose logarithm stands for logits.
        foreign: whether it goes through steps of its own that can be softened; None: not known.
        sites: those steps of its own that are elementwise, with their thresholds.
        queries: images passed forward, in all.
        gradients: images passed forward with a gradient wanted.
        without_gradient: what torch said where it had no gradient: attacks see zeros, and training
            refuses the model; None: nothing.
        last: whether its convolutions may lie channels last; None: not known.
    """

    def __init__(self, model: nn.Module, threat: Threat, key: str | None = None) -> None:
        super().__init__()
        self.model, self.threat, self.key = model, threat, key
        self.training = model.training
        self.probabilities = False
        self.foreign: bool | None = None
        self.sites: tuple[Site, ...] = ()
        self._looking = False
        self.last: bool | None = None
        self.without_gradient: str | None = None
        self.queries = self.gradients = 0

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (N, classes) in float32 for pixels (N, C, H, W) within the bounds.

        Each row is finite, or NaN where it names no class: see
        :func:`quantguard.attacks.losses.decided`. A gradient that is NaN comes back as zero.
        """
        self.queries += pixels.shape[0]
        attacked = pixels.requires_grad and torch.is_grad_enabled()
        if attacked:
            self.gradients += pixels.shape[0]
            # 0 / 0, as where the logarithm of no vote is masked: it would end every climb
            if not is_compiled(self.model):
                pixels = pixels.view_as(pixels)
                pixels.register_hook(torch.nan_to_num)  # type: ignore[no-untyped-call]
        try:
            logits = self._logits(pixels, attacked)
        except RuntimeError as error:  # torch's, where numpy, say, computes a part
            if not attacked or out_of_memory(error):
                raise
            with torch.no_grad():  # where that is not what is wrong, it raises again
                logits = self._logits(pixels, False)
            self.has_no_gradient(error)
        if attacked:
            # where no path leads back an attack sees the zero gradient that this is, a flag says so
            logits = logits + 0 * pixels.flatten(1).sum(1, keepdim=True)
        return decided(logits)

    def _logits(self, pixels: Tensor, attacked: bool) -> Tensor:
        x = from_pixels(pixels, self.threat).to(eaten_by(self.model) or pixels.dtype)
        if x is pixels and not is_compiled(self.model):  # which asks an image for its .grad
            x = x.clone()  # a forward may write to what it is given
        # FewChannels' Function would hide from step_sites what a convolution is given
        fast = attacked and not self.sites and not self._looking and not is_compiled(self.model)
        with FewChannels() if fast else nullcontext(), checkpoints_inlined():
            output = self.model(x) if self.key is None else self.model(**{self.key: x})
        logits = logits_of(output)
        if logits.is_inference() and not torch.is_inference_mode_enabled():
            logits = logits.clone()  # of a forward in inference mode
        logits = logits.to(pixels.dtype)  # of autocast, or a half-precision model
        if self.probabilities:
            logits = logits.clamp_min(torch.finfo(torch.float32).tiny).log()
        return logits

    def has_no_gradient(self, error: RuntimeError) -> None:
        """Note, and warn once, that torch has no gradient of the model, and what it says."""
        said = first_line(error)
        if self.without_gradient is None:
            warnings.warn("the model has no gradient in its images, and attacks that need one see "
                          f"zeros. torch says: {said}", stacklevel=2)
        self.without_gradient = said

    def look_for_foreign_steps(self, pixels: Tensor) -> None:
        """Find out once whether there are any; these images are not counted."""
        if self.foreign is not None:
            return
        asked = self.queries, self.gradients
        before, self.without_gradient = self.without_gradient, None
        if not is_compiled(self.model):
            few = pixels[:min(_LOOKED_AT, max(_LEAST_LOOKED_AT, _PIXELS // pixels[0].numel()))]
            low, high = self.threat.bounds
            # images are on a grid, and what is done to each pixel would look like steps
            noise = torch.rand(few.shape, generator=torch.Generator().manual_seed(0)) - 0.5
            few = (few + (high - low) / 4 * noise.to(few)).clamp(low, high)
            self._looking = True
            try:
                with soften(self, 8.0), buffers_kept(self):
                    self.sites = find_sites(self, few, self.model)
            finally:
                self._looking, self.without_gradient = False, None
        found = has_foreign_steps(self, pixels[:2], self.sites, self.model)
        # softened it must run with a gradient: it is nothing to climb otherwise
        self.foreign = found and self.without_gradient is None
        self.without_gradient = self.without_gradient or before
        if not self.foreign:
            self.sites = ()
        self.queries, self.gradients = asked

    @contextmanager
    def seen_through(self, k: float | None, by_image: bool = False,
                     slope: float | None = None) -> Iterator[None]:
        """Give what hides the gradient one, inside the context: see :mod:`quantguard.straight`.

        Max-pools before quantizers, too, and other people's quantizers softened; look for them
        first.

        Args:
            k: their sharpness; None: what they compute stays.
            by_image: as of :func:`quantguard.soften`.
            slope: where it stays, whose gradient it has: of steps of this sharpness; None: of the
                line through them.
        """
        with pools_first(self), straight_through(
                k if self.foreign else None, self.sites, by_image, slope) as mode, \
                mode.begun_by(self.model) if self.sites else nullcontext():
            yield

    @contextmanager
    def softened(self, k: float) -> Iterator[None]:
        """Soften every quantizer, ours and other people's, as attacks climb them."""
        with soften(self, k), self.seen_through(k):
            yield

    @contextmanager
    def laid_out(self, pixels: Tensor) -> Iterator[None]:
        """Hold weights channels last while attacking, where that changes nothing but rounding.

        On a CPU depthwise convolutions and those of small nets are faster so, a ResNet's as fast.
        Whether an image has fallen is for the model as it lies to say. Not for attacks that end at
        the boundary, where rounding decides. These images are not counted.
        """
        if self.last is None:
            asked = self.queries, self.gradients
            self.last = pixels.device.type == "cpu" and takes_channels_last(self, pixels[:2])
            self.queries, self.gradients = asked
        with channels_last(self) if self.last else nullcontext():
            yield

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the pixels it is trained on: float64 where its weights are."""
        return torch.float64 if eaten_by(self.model) == torch.float64 else torch.float32

    @property
    def quantized(self) -> bool:
        """Return whether the model has staircases."""
        return bool(staircases(self.model))


class _Guarded(torch.autograd.Function):
    """Compute logits; backward: their gradient in the pixels, zeros where torch has none."""

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
    """Return a model's logits for an attack that computes the gradient in the pixels by itself."""
    if not (pixels.requires_grad and torch.is_grad_enabled()):
        return model(pixels)  # type: ignore[no-any-return]
    return _Guarded.apply(pixels, model)  # type: ignore[no-any-return]


class _ForFoolbox(nn.Module):
    """Hand pixels to a model, guarded."""

    def __init__(self, model: PixelModel) -> None:
        super().__init__()
        self.model, self.training = model, model.training

    def forward(self, pixels: Tensor) -> Tensor:
        return guarded(self.model, pixels)


class FoolboxModel(fb.models.PyTorchModel):
    """A Foolbox model that our attacks can see through: ``.module`` is the nn.Module itself.

    Unlike ``foolbox.PyTorchModel`` it leaves the model on its device. Works with every Foolbox
    attack. Put the model in eval mode first.

    Args:
        model: a user's model, or a :class:`PixelModel`.
        threat: bounds, mean and std.
    """

    def __init__(self, model: nn.Module, threat: Threat = Threat()) -> None:
        self.module = model if isinstance(model, PixelModel) else PixelModel(model, threat)
        super().__init__(_ForFoolbox(self.module), bounds=threat.bounds, device=device_of(model))


def labels_of(criterion: Any) -> Tensor:
    """Return the labels (N,) that an untargeted attack leads away from.

    Raises:
        SpecError: another criterion.
    """
    wanted = fb.attacks.base.get_criterion(criterion)
    if not isinstance(wanted, fb.criteria.Misclassification):
        raise SpecError(f"this attack is untargeted, and {type(wanted).__name__} is not",
                        fix="Give labels, or foolbox.criteria.Misclassification.")
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
            f"this attack looks into the model, and {type(model).__name__} hides it",
            fix="Wrap the model in quantguard.attacks.FoolboxModel(model, threat).")
    return module
