"""Thresholds that fit samples of an activation: the step of the smallest mean squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn.quant_activation import QuantActivation

# Values that one quantizer (or one channel) is fitted to; more change the step by under 1%.
_SAMPLES = 16384
_SAMPLES_PER_CHANNEL = 1024
_AT_ONCE = 1 << 18  # values processed at once, so that they stay in the cache


def mse_step(samples: Tensor, m: int) -> tuple[Tensor, float]:
    """Return the step (rows,) and the zero level of the uniform quantizer that fits samples best.

    Its levels are ``step * (j - zero)``, j = 0..m, with thresholds half-way between them.

    Args:
        samples: (rows, n) values of f(x); rows share the zero level.
        m: number of thresholds.
    """
    peak = samples.abs().amax(1)
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    shares = torch.logspace(-1.4, 0.2, 33).unsqueeze(1)

    def errors(values: Tensor, shares: Tensor, zero: float) -> Tensor:
        """Return the error of each step tried as (shares, rows)."""
        steps = peak * shares / max(m - zero, zero, 0.5)
        parts = torch.split(steps, max(1, _AT_ONCE // values.numel()))
        return torch.cat([_error(values, some, m, zero) for some in parts])

    zero = 0.0
    few = samples[:, :: max(1, samples.shape[1] // 2048)]
    if samples.min() < -1e-6 * max(float(samples.max()), 1e-12):
        # All rows share the zero level, so a few values of each are enough.
        sparse = samples[:, :: max(1, samples.shape[1] // max(2048 // len(samples), 64))]
        zero = min(_zeros(m, samples), key=lambda z: float(errors(sparse, shares, z).amin(0).sum()))
    near = shares[errors(few, shares, zero).argmin(0), 0]
    fine = torch.linspace(0.9, 1.1, 11).unsqueeze(1) * near
    best = errors(samples, fine, zero).argmin(0)
    top = max(m - zero, zero, 0.5)
    return peak * fine.gather(0, best.unsqueeze(0)).squeeze(0) / top, zero


def _zeros(m: int, samples: Tensor) -> list[float]:
    """Return zero levels to try: multiples of 1/2, or those near the share of negative values."""
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
    """Set module's thresholds to fit samples (rows, n) of f(x)."""
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


def sampled_rows(values: Tensor, per_channel: bool, axis: int,
                 generator: torch.Generator) -> Tensor:
    """Return a random choice of values as (rows, n)."""
    values = values.detach().float().cpu()
    rows = values.movedim(axis, 0).flatten(1) if per_channel else values.reshape(1, -1)
    most = _SAMPLES_PER_CHANNEL if per_channel else _SAMPLES
    if rows.shape[1] <= most:
        return rows
    return rows[:, torch.randint(rows.shape[1], (most,), generator=generator)]
