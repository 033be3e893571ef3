"""Where thresholds start: data, BatchNorm statistics where there is none, else a seeded probe.

Each staircase gets the step (and, after a signed activation, the zero level) with the smallest
mean squared error between f(x) and q(f(x)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .activation import QuantActivation, staircases
from .contexts import observing
from .errors import ConversionError, DataError
from .plan import Site
from .running import changed, evaluating, modes_kept, run, seeded

# Values that place one staircase (or one channel of it); more change the step by under a percent.
_SAMPLES = 16384
_SAMPLES_PER_CHANNEL = 1024
_FEW = 32  # values of a channel, as behind a pooling layer: too few to place it by itself
_AT_ONCE = 1 << 18  # values worked on at once: they stay in the cache
# A seeded probe: images of this many values or more give enough of them one by one.
_PROBE_IMAGES = 8
_LARGE = 1 << 15


def mse_step(samples: Tensor, m: int) -> tuple[Tensor, float]:
    """Return step (rows,) and zero level of the uniform staircase nearest to samples.

    Levels ``step * (j - zero)``, j = 0..m, thresholds half-way between them.

    Args:
        samples: (rows, n) values of f(x); rows share the zero level.
        m: number of thresholds.
    """
    peak = samples.abs().amax(1)
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    shares = torch.logspace(-1.4, 0.2, 33).unsqueeze(1)

    def errors(values: Tensor, shares: Tensor, zero: float) -> Tensor:
        """Return (shares, rows): the error of each step tried."""
        steps = peak * shares / max(m - zero, zero, 0.5)
        parts = torch.split(steps, max(1, _AT_ONCE // values.numel()))
        return torch.cat([_error(values, some, m, zero) for some in parts])

    zero = 0.0
    few = samples[:, :: max(1, samples.shape[1] // 2048)]
    if samples.min() < -1e-6 * max(float(samples.max()), 1e-12):
        # All rows together choose it: a few values of each will do.
        sparse = samples[:, :: max(1, samples.shape[1] // max(2048 // len(samples), 64))]
        zero = min(_zeros(m, samples), key=lambda z: float(errors(sparse, shares, z).amin(0).sum()))
    near = shares[errors(few, shares, zero).argmin(0), 0]
    fine = torch.linspace(0.9, 1.1, 11).unsqueeze(1) * near
    best = errors(samples, fine, zero).argmin(0)
    top = max(m - zero, zero, 0.5)
    return peak * fine.gather(0, best.unsqueeze(0)).squeeze(0) / top, zero


def _zeros(m: int, samples: Tensor) -> list[float]:
    """Return zero levels worth trying: multiples of 1/2, or those near the range's share."""
    if m <= 15:
        return [z / 2 for z in range(2 * m + 1)]
    share = float(-samples.min() / (samples.max() - samples.min()).clamp_min(1e-12))
    middle = round(m * min(share, 1.0))
    near = {min(max(middle * c // 8, 0), m) for c in range(1, 10)}
    return sorted({0.0, m / 2, float(m)} | {float(z) for z in near})


def _error(samples: Tensor, steps: Tensor, m: int, zero: float) -> Tensor:
    """Return the mean squared error of each step: samples (rows, n), steps (tried, rows)."""
    steps = steps.unsqueeze(2)
    level = (samples / steps + zero).round_().clamp_(0, m).sub_(zero)
    return level.mul_(steps).sub_(samples).square_().mean(2)


def place(module: QuantActivation, samples: Tensor) -> None:
    """Place module's thresholds for samples (rows, n) of f(x)."""
    spec, m = module.spec, module.spec.thresholds
    if spec.form == "tanh":
        top = 2**spec.bits - 1
        level = torch.arange(m, dtype=torch.float64) - top + 0.5
        t, step, zero = torch.atanh(level / top).float(), torch.tensor(1 / top), float(top)
    elif spec.form == "sign":
        t, step, zero = torch.zeros(1), torch.tensor(2.0), 0.5
    else:
        step, zero = mse_step(samples, m)
        step = step * spec.range_factor
        t = step.unsqueeze(1) * (torch.arange(1, m + 1) - 0.5 - zero)
        if not spec.per_channel:
            t, step = t[0], step[0]
    if spec.form != "uniform" and spec.per_channel:
        rows = samples.shape[0]
        t, step = t.expand(rows, m), step.expand(rows)
    module.set_thresholds(t, step, zero, width=step)


def _rows(values: Tensor, per_channel: bool, axis: int, generator: torch.Generator) -> Tensor:
    """Return a random choice of values as (rows, n)."""
    values = values.detach().float().cpu()
    rows = values.movedim(axis, 0).flatten(1) if per_channel else values.reshape(1, -1)
    most = _SAMPLES_PER_CHANNEL if per_channel else _SAMPLES
    if rows.shape[1] <= most:
        return rows
    return rows[:, torch.randint(rows.shape[1], (most,), generator=generator)]


def from_statistics(model: nn.Module, site: Site, module: QuantActivation) -> None:
    """Place one staircase from the BatchNorms that feed it: a normal per channel, then f.

    Means and variances add where outputs are added.
    """
    normals: list[Any] = [model.get_submodule(name) for name in site.statistics]
    mean = variance = torch.zeros(1)
    for norm in normals:
        scale, shift = norm.weight, norm.bias
        channels = norm.running_mean.numel() if norm.running_mean is not None else norm.num_features
        mean = mean + (torch.zeros(channels) if shift is None else shift.detach().float().cpu())
        variance = variance + (torch.ones(channels) if scale is None
                               else scale.detach().float().cpu().square())
    # A sample is drawn from them anyway: many channels need few points each.
    number = max(16, min(512, 1 << 16 >> (len(mean) - 1).bit_length()))
    points = (torch.arange(number, dtype=torch.float32) + 0.5) / number
    inputs = mean.unsqueeze(1) + variance.sqrt().unsqueeze(1) * torch.special.ndtri(points)
    values = module.function(inputs).detach()
    generator = torch.Generator().manual_seed(0)
    place(module, _rows(values, module.spec.per_channel, 0, generator))


def from_batches(model: nn.Module, batches: Iterable[Any], names: Iterable[str], seed: int = 0,
                 what: str = "batch {} of data") -> set[str]:
    """Place the named staircases from what their activations put out; return those that ran."""
    modules = staircases(model)
    seen: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)

    def collector(name: str) -> Callable[[Tensor], None]:
        spec, axis = modules[name].spec, modules[name].axis

        def collect(y: Tensor) -> None:
            if y.numel():  # a head that got no boxes says nothing
                seen.setdefault(name, []).append(_rows(y, spec.per_channel, axis or 0, generator))
        return collect

    with observing(model, {name: collector(name) for name in names}), torch.no_grad():
        for number, batch in enumerate(batches):
            run(model, batch, what.format(number))
    for name, parts in seen.items():
        samples = torch.cat(parts, 1)
        if not torch.isfinite(samples).all():
            raise DataError(f"activation {name!r} puts out NaN or infinity on the calibration data")
        if samples.shape[1] < _FEW:  # of a channel: all channels together
            samples = samples.reshape(1, -1).expand(len(samples), -1)
        place(modules[name], samples)
    return set(seen)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put the model's own buffers back afterwards."""
    buffers = [(b, b.detach().clone()) for module in model.modules()
               if not isinstance(module, QuantActivation) for b in module.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)


def probe(model: nn.Module, example: Any, names: set[str], seed: int = 0) -> set[str]:
    """Place the named staircases from seeded normal inputs; return those that ran.

    BatchNorms normalise by the probe's own statistics, so that what they put out is distributed
    as on real data, whatever the inputs are. Of large images one is tried at half its height and
    width first: of noise an eighth of the values says as much.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())

    def normal(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        # A BatchNorm needs two images to have statistics.
        images = _PROBE_IMAGES if x[:1].numel() < _LARGE else 2 if norms else 1
        shape = (images, *x.shape[1:]) if isinstance(example, Tensor) else x.shape
        return torch.randn(shape, generator=generator).to(x.device, x.dtype)

    inputs = changed(example, normal)
    runs = [(inputs, False), (inputs, True)]
    if isinstance(inputs, Tensor) and inputs.dim() > 3 and inputs[:1].numel() >= _LARGE:
        runs.insert(0, (inputs[:1, ..., ::2, ::2], False))
    ran: set[str] = set()
    with modes_kept(model), _buffers_kept(model), seeded(seed):
        for number, (some, training) in enumerate(runs):
            if not names - ran or (ran and not training):
                continue
            model.train(training)
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.training = True
            # Auxiliary heads run in train mode only, where some models want targets, too: what is
            # not reached so only starts from a unit normal.
            with suppress(DataError) if training or number < len(runs) - 2 else nullcontext():
                ran |= from_batches(model, [some], names - ran, seed, "example")
    return ran


def calibrate(model: nn.Module, sites: Iterable[Site], data: Iterable[Any] | None,
              example: Any) -> None:
    """Place every staircase of a freshly converted model.

    Args:
        model: the converted model.
        sites: its converted sites.
        data: model inputs (tensors or dicts); None: BatchNorm statistics, else the probe.
        example: one input whose shapes the probe takes; None where none is known.

    Raises:
        ConversionError: nothing says where some thresholds should start.
    """
    modules = staircases(model)
    left = {site.name: site for site in sites}
    if data is not None:
        with evaluating(model), _buffers_kept(model):
            for name in from_batches(model, data, left):
                del left[name]
    for name, site in list(left.items()):
        if site.statistics:
            from_statistics(model, site, modules[name])
            del left[name]
    # Forms of the lineage have their thresholds by definition.
    for name in [n for n in left if modules[n].spec.form != "uniform"]:
        place(modules[name], torch.zeros(1, 1))
        del left[name]
    if left and example is not None:
        for name in probe(model, example, set(left)):
            del left[name]
    if left and example is None:
        raise ConversionError(
            f"no thresholds for {', '.join(list(left)[:4])}{' …' if len(left) > 4 else ''}",
            why="No BatchNorm feeds them, and no input was found that the model accepts.",
            fix="Pass data=, or example= (--input-shape), a batch that the model eats.")
    for name in left:  # code that no input reached: a unit normal
        points = torch.special.ndtri((torch.arange(512) + 0.5) / 512).reshape(1, -1)
        place(modules[name], modules[name].function(points).detach())
