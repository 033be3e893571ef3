"""Calibrate thresholds from data, else from BatchNorm statistics, else from seeded normal inputs.

Each quantizer gets the step (and, after a signed activation, the zero level) with the smallest
mean squared error between f(x) and q(f(x)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConversionError, DataError
from ..core.model_calls import run
from ..core.module_utils import evaluating, modes_restored
from ..core.nested_tensors import changed
from ..core.runtime import seeded
from ..nn.contexts import observing
from ..nn.quant_activation import QuantActivation, quantizers
from .plan import Site
from .threshold_fit import place, sampled_rows

_FEW = 32  # values of a channel, as after a pooling layer: too few to calibrate it alone
# Normal inputs: so many images, or fewer if one image has _LARGE values or more.
_NORMAL_IMAGES = 8
_LARGE = 1 << 15


def from_statistics(model: nn.Module, site: Site, module: QuantActivation) -> None:
    """Calibrate one quantizer from the BatchNorms before it, as normal inputs of each channel.

    Where outputs of several BatchNorms are added, their means and variances are added.
    """
    normals: list[Any] = [model.get_submodule(name) for name in site.statistics]
    mean = variance = torch.zeros(1)
    for norm in normals:
        scale, shift = norm.weight, norm.bias
        channels = norm.running_mean.numel() if norm.running_mean is not None else norm.num_features
        mean = mean + (torch.zeros(channels) if shift is None else shift.detach().float().cpu())
        variance = variance + (torch.ones(channels) if scale is None
                               else scale.detach().float().cpu().square())
    # A sample is drawn from all channels together, so many channels need few points each.
    number = max(16, min(512, 1 << 16 >> (len(mean) - 1).bit_length()))
    points = (torch.arange(number, dtype=torch.float32) + 0.5) / number
    inputs = mean.unsqueeze(1) + variance.sqrt().unsqueeze(1) * torch.special.ndtri(points)
    values = module.function(inputs).detach()
    generator = torch.Generator().manual_seed(0)
    place(module, sampled_rows(values, module.spec.per_channel, 0, generator))


def from_batches(model: nn.Module, batches: Iterable[Any], names: Iterable[str], seed: int = 0,
                 what: str = "batch {} of data") -> set[str]:
    """Calibrate the named quantizers from activation outputs; return those that ran."""
    modules = quantizers(model)
    seen: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)

    def collector(name: str) -> Callable[[Tensor], None]:
        spec, axis = modules[name].spec, modules[name].axis

        def collect(y: Tensor) -> None:
            if y.numel():  # the head of a detector may get no boxes
                seen.setdefault(name, []).append(
                    sampled_rows(y, spec.per_channel, axis or 0, generator))
        return collect

    with observing(model, {name: collector(name) for name in names}), torch.no_grad():
        for number, batch in enumerate(batches):
            run(model, batch, what.format(number))
    for name, parts in seen.items():
        samples = torch.cat(parts, 1)
        if not torch.isfinite(samples).all():
            raise DataError(
                f"activation {name!r} outputs NaN or infinity on the calibration data")
        if samples.shape[1] < _FEW:  # too few per channel: take all channels together
            samples = samples.reshape(1, -1).expand(len(samples), -1)
        place(modules[name], samples)
    return set(seen)


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    """Restore the model's own buffers afterwards."""
    buffers = [(b, b.detach().clone()) for module in model.modules()
               if not isinstance(module, QuantActivation) for b in module.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)


def from_normal_inputs(model: nn.Module, example: Any, names: set[str], seed: int = 0) -> set[str]:
    """Calibrate the named quantizers from seeded normal inputs; return the names of those that ran.

    BatchNorms normalise by the statistics of these inputs, so their outputs are distributed as on
    real data. For large images, one image of half the height and width is tried first, since
    noise needs no more values.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())

    def normal(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        # The statistics of a BatchNorm need two images.
        images = _NORMAL_IMAGES if x[:1].numel() < _LARGE else 2 if norms else 1
        shape = (images, *x.shape[1:]) if isinstance(example, Tensor) else x.shape
        return torch.randn(shape, generator=generator).to(x.device, x.dtype)

    inputs = changed(example, normal)
    runs = [(inputs, False), (inputs, True)]
    if isinstance(inputs, Tensor) and inputs.dim() > 3 and inputs[:1].numel() >= _LARGE:
        runs.insert(0, (inputs[:1, ..., ::2, ::2], False))
    ran: set[str] = set()
    with modes_restored(model), _buffers_restored(model), seeded(seed):
        for number, (some, training) in enumerate(runs):
            if not names - ran or (ran and not training):
                continue
            model.train(training)
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.training = True
            # Auxiliary heads run in train mode only, where some models need targets. If this
            # fails, their quantizers start from a unit normal.
            with suppress(DataError) if training or number < len(runs) - 2 else nullcontext():
                ran |= from_batches(model, [some], names - ran, seed, "example")
    return ran


def calibrate(model: nn.Module, sites: Iterable[Site], data: Iterable[Any] | None,
              example: Any) -> None:
    """Calibrate every quantizer of a newly converted model.

    Args:
        model: the converted model.
        sites: its converted sites.
        data: model inputs (tensors or dicts); None: BatchNorm statistics, else normal inputs.
        example: one input, whose shapes normal inputs take; None: not known.

    Raises:
        ConversionError: some thresholds have no source of values.
    """
    modules = quantizers(model)
    left = {site.name: site for site in sites}
    if data is not None:
        with evaluating(model), _buffers_restored(model):
            for name in from_batches(model, data, left):
                del left[name]
    for name, site in list(left.items()):
        if site.statistics:
            from_statistics(model, site, modules[name])
            del left[name]
    # The thresholds of the forms "tanh" and "sign" are fixed by definition.
    for name in [n for n in left if modules[n].spec.form != "uniform"]:
        place(modules[name], torch.zeros(1, 1))
        del left[name]
    if left and example is not None:
        for name in from_normal_inputs(model, example, set(left)):
            del left[name]
    if left and example is None:
        raise ConversionError(
            f"no thresholds for {', '.join(list(left)[:4])}{' …' if len(left) > 4 else ''}",
            why="No BatchNorm precedes them, and no input was found that the model accepts.",
            fix="Pass data=, or example= (--input-shape), a batch that the model accepts.")
    for name in left:  # no input reached these: start from a unit normal
        points = torch.special.ndtri((torch.arange(512) + 0.5) / 512).reshape(1, -1)
        place(modules[name], modules[name].function(points).detach())
