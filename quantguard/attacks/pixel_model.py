"""PixelModel: a user's model as a function from pixels to logits, with query counts and BPDA."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConversionError
from ..core.model_calls import checkpoints_inlined, described, first_line, out_of_memory, picked
from ..core.module_utils import buffers_restored
from ..core.nested_tensors import input_dtype_of
from ..core.specs import Threat
from ..data.batches import from_pixels
from ..nn.contexts import soften
from ..nn.conv_input_grad import ConvInputGrad
from ..nn.memory_format import channels_last, is_compiled, takes_channels_last
from ..nn.pool_reordering import pools_first
from ..nn.quant_activation import quantizers
from .bpda import has_nondifferentiable, straight_through
from .losses import decided
from .step_sites import Site, find_sites

# Images in which other people's quantizers are searched: at most, at least, and pixels in all.
_MOST_IMAGES, _LEAST_IMAGES, _PIXELS = 64, 4, 2**18


def logits_of(output: Any) -> Tensor:
    """Return the logits (N, classes) in the output of a classifier.

    Raises:
        ConversionError: the output contains no (N, classes) tensor.
    """
    logits = picked(output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ConversionError(
            f"the model returns {described(output)} where logits (N, classes) are needed",
            fix="Return a tensor, a dict with 'logits' or with nothing else, or a tuple that "
                "starts with them.")
    return logits


class PixelModel(nn.Module):
    """Module that computes a model's logits from pixels, and counts the images.

    Args:
        model: the user's model, which takes ``(pixels - mean) / std``.
        threat: bounds, mean and std.
        key: keyword argument under which the model takes images; None: its first argument.

    Attributes:
        probabilities: whether the model returns a softmax, whose logarithm is used as logits.
        softenable: whether it contains non-differentiable operations of its own that can be
            softened; None: not known yet.
        sites: those of them that are elementwise quantizers, with their thresholds.
        queries: number of images passed forward.
        gradients: number of images passed forward with a gradient.
        without_gradient: torch's message if the model has no gradient, in which case attacks see
            zeros and training refuses the model; else None.
        last: whether its weights may be channels last; None: not known yet.
    """

    def __init__(self, model: nn.Module, threat: Threat, key: str | None = None) -> None:
        super().__init__()
        self.model, self.threat, self.key = model, threat, key
        self.training = model.training
        self.probabilities = False
        self.softenable: bool | None = None
        self.sites: tuple[Site, ...] = ()
        self._finding_sites = False
        self.last: bool | None = None
        self.without_gradient: str | None = None
        self.queries = self.gradients = 0

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (N, classes) in float32 for pixels (N, C, H, W) within the bounds.

        Each row is finite, or NaN if it predicts no class: see
        :func:`quantguard.attacks.losses.decided`. NaN in the gradient is replaced by zero.
        """
        self.queries += pixels.shape[0]
        attacked = pixels.requires_grad and torch.is_grad_enabled()
        if attacked:
            self.gradients += pixels.shape[0]
            # NaN (0 / 0, as behind a masked logarithm of zero votes) would stop every attack.
            if not is_compiled(self.model):
                pixels = pixels.view_as(pixels)
                pixels.register_hook(torch.nan_to_num)  # type: ignore[no-untyped-call]
        try:
            logits = self._logits(pixels, attacked)
        except RuntimeError as error:  # no gradient: numpy computes a part of the model, say
            if not attacked or out_of_memory(error):
                raise
            with torch.no_grad():  # any other error is raised again here
                logits = self._logits(pixels, False)
            self.record_missing_gradient(error)
        if attacked:
            # A model without a path to its input gets a zero gradient; a flag reports that.
            logits = logits + 0 * pixels.flatten(1).sum(1, keepdim=True)
        return decided(logits)

    def _logits(self, pixels: Tensor, attacked: bool) -> Tensor:
        x = from_pixels(pixels, self.threat).to(input_dtype_of(self.model) or pixels.dtype)
        if x is pixels and not is_compiled(self.model):  # a compiled model reads the .grad of x
            x = x.clone()  # the forward may write to its input
        # ConvInputGrad's Function would hide a convolution's arguments from step_sites.
        fast = attacked and not (self.sites or self._finding_sites or is_compiled(self.model))
        with ConvInputGrad() if fast else nullcontext(), checkpoints_inlined():
            output = self.model(x) if self.key is None else self.model(**{self.key: x})
        logits = logits_of(output)
        if logits.is_inference() and not torch.is_inference_mode_enabled():
            logits = logits.clone()  # from a forward in inference mode
        logits = logits.to(pixels.dtype)  # from autocast, or a half-precision model
        if self.probabilities:
            logits = logits.clamp_min(torch.finfo(torch.float32).tiny).log()
        return logits

    def record_missing_gradient(self, error: RuntimeError) -> None:
        """Record torch's message that the model has no gradient, and warn once."""
        message = first_line(error)
        if self.without_gradient is None:
            warnings.warn("the model has no gradient in its images, and attacks that need one see "
                          f"zeros. torch says: {message}", stacklevel=2)
        self.without_gradient = message

    def find_step_functions(self, pixels: Tensor) -> None:
        """Set ``softenable`` and ``sites``, once; these images are not counted."""
        if self.softenable is not None:
            return
        counts = self.queries, self.gradients
        before, self.without_gradient = self.without_gradient, None
        if not is_compiled(self.model):
            count = min(_MOST_IMAGES, max(_LEAST_IMAGES, _PIXELS // pixels[0].numel()))
            few = pixels[:count]
            low, high = self.threat.bounds
            # Pixels are on a grid, and any function of a pixel would look like a step function.
            noise = torch.rand(few.shape, generator=torch.Generator().manual_seed(0)) - 0.5
            few = (few + (high - low) / 4 * noise.to(few)).clamp(low, high)
            self._finding_sites = True
            try:
                with soften(self, 8.0), buffers_restored(self):
                    self.sites = find_sites(self, few, self.model)
            finally:
                self._finding_sites, self.without_gradient = False, None
        found = has_nondifferentiable(self, pixels[:2], self.sites, self.model)
        # Without a gradient the softened model is of no use to an attack.
        self.softenable = found and self.without_gradient is None
        self.without_gradient = self.without_gradient or before
        if not self.softenable:
            self.sites = ()
        self.queries, self.gradients = counts

    @contextmanager
    def through_bpda(self, k: float | None, by_image: bool = False,
                     slope: float | None = None) -> Iterator[None]:
        """Give non-differentiable operations a gradient, in the context.

        Max-pools are applied before quantizers, too. Call :meth:`find_step_functions` first, so
        that other people's quantizers are known. See :mod:`quantguard.attacks.bpda`.

        Args:
            k: sharpness of the softened operations; None: values stay as they are.
            by_image: as of :func:`quantguard.soften`.
            slope: without k: sharpness of the softened steps whose gradient is used; None: that of
                the line through the steps.
        """
        with pools_first(self), straight_through(
                k if self.softenable else None, self.sites, by_image, slope) as mode, \
                mode.counting_from(self.model) if self.sites else nullcontext():
            yield

    @contextmanager
    def softened(self, k: float) -> Iterator[None]:
        """Soften every quantizer, ours and other people's, as attacks do, in the context."""
        with soften(self, k), self.through_bpda(k):
            yield

    @contextmanager
    def laid_out(self, pixels: Tensor) -> Iterator[None]:
        """Convert weights to channels last in the context, where only rounding changes.

        On a CPU this is faster for depthwise convolutions and small nets, and as fast for a
        ResNet. Whether an image is broken is decided in the original memory format. Not for
        minimum-norm attacks: they end at the boundary, where rounding decides. These images are
        not counted.
        """
        if self.last is None:
            counts = self.queries, self.gradients
            self.last = pixels.device.type == "cpu" and takes_channels_last(self, pixels[:2])
            self.queries, self.gradients = counts
        with channels_last(self) if self.last else nullcontext():
            yield

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of training pixels: float64 if the weights are, else float32."""
        return torch.float64 if input_dtype_of(self.model) == torch.float64 else torch.float32

    @property
    def quantized(self) -> bool:
        """Return whether the model has quantizers of ours."""
        return bool(quantizers(self.model))
