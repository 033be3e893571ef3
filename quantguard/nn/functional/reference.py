"""The staircase in plain tensor operations, for torch.compile, torch.export and torch.func.

The function and its gradients are those of ``staircase.py``, which is faster without a compiler.
The forward is the hard staircase; adding ``line - line.detach()`` gives it the surrogate gradient.
:func:`recorded` is the forward alone, for torch.jit.trace and the ONNX exporter built on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Up to so many comparisons are written one by one, which a compiler vectorises.
_UNROLL_UP_TO = 31
# The same limit in a recorded graph, where each comparison is an operation on the whole tensor.
_RECORD_UP_TO = 7


def _rows(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Return one number, or one per channel, in a shape that broadcasts against x."""
    if axis is None:
        return values
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


def count_by_search(x: Tensor, bounds: Tensor, axis: int | None) -> Tensor:
    """Return how many of the ascending bounds are < x, by a binary search for each element."""
    if axis is None:
        return torch.bucketize(x.contiguous(), bounds).float()  # it warns about other strides
    rows = x.movedim(axis, 0)
    counts = torch.searchsorted(bounds, rows.reshape(rows.shape[0], -1).contiguous())
    return counts.reshape(rows.shape).movedim(0, axis).float()


def _count(x: Tensor, bounds: Tensor, axis: int | None) -> Tensor:
    """Return, for each element of x, how many of the ascending bounds are < x, as float32."""
    if bounds.shape[-1] <= _UNROLL_UP_TO:
        first, *rest = bounds.unbind(-1)
        count = (x > _rows(first, x, axis)).float()
        for bound in rest:
            count = count + (x > _rows(bound, x, axis)).float()
        return count
    return count_by_search(x, bounds, axis)


def _pick(table: Tensor, index: Tensor, axis: int | None) -> Tensor:
    """Return ``table[..., index]`` elementwise."""
    if axis is None:
        return table[index]
    rows = index.movedim(axis, 0)
    return table.gather(1, rows.flatten(1)).reshape(rows.shape).movedim(0, axis)


def _hard(x: Tensor, t: Tensor, step: Tensor, zero: Tensor, axis: int | None) -> Tensor:
    value = (_count(x, t.detach(), axis) - zero) * _rows(step, x, axis)
    return torch.where(x != x, x, value)  # NaN stays NaN


def recording() -> bool:
    """Return whether torch.jit.trace, or the ONNX exporter built on it, is recording."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


@contextmanager
def _paused() -> Iterator[None]:
    binding: Any = torch._C  # its stubs lack the setter
    state = binding._get_tracing_state()
    binding._set_tracing_state(None)
    try:
        with torch.no_grad():
            yield
    finally:
        binding._set_tracing_state(state)


def unrecorded() -> AbstractContextManager[Any]:
    """Return a context whose results are constants in the graph that is being recorded, if any."""
    return _paused() if recording() else nullcontext()


def recorded(x: Tensor, t: Tensor, step: Tensor, zero: Tensor, axis: int | None) -> Tensor:
    """Return the hard staircase by operations that TorchScript saves and ONNX supports.

    It has no gradient: a recorded graph is for inference, not for training or attacks.

    Args:
        x: float32, any shape; the others as in ``staircase.py``, constants in the graph.
    """
    x = x.detach()
    with unrecorded():  # sizes, too: if recorded, they are tensors
        m, flat, size = t.shape[-1], t.detach().reshape(-1), _rows(step.detach(), x, axis)
        bounds = [_rows(bound, x, axis) for bound in t.detach().unbind(-1)]
        half = (m + 1) // 2
        # Offsets into `flat` for each row's search, for each size of its half.
        rows = torch.arange(flat.shape[0] // m, device=t.device) * m - 1
        places = {half >> n: _rows(rows + (half >> n), x, axis) for n in range(m.bit_length())}
    level = (x > bounds[half - 1]).float()
    if m <= _RECORD_UP_TO:
        for bound in (*bounds[: half - 1], *bounds[half:]):
            level = level + (x > bound).float()
    else:
        # A binary search: m is 2^bits - 1, and each halving gives one more bit of the level.
        found = level.long() * half
        while half > 1:
            half //= 2
            found = found + (x > flat[found + places[half]]).long() * half
        level = found.float()
    return torch.where(torch.isnan(x), x, (level - zero.detach()) * size)


def windowed(x: Tensor, t: Tensor, step: Tensor, edges: Tensor, widths: Tensor, zero: Tensor,
             mode: str, gate: tuple[float, float] | None, axis: int | None) -> Tensor:
    """Return the staircase with the gradient of mode ``ramp``, ``ste`` or ``parent``.

    Args:
        x: float32, any shape; the others as in ``staircase.py``.
    """
    m = t.shape[-1]
    edges, slopes = edges.detach(), (step.unsqueeze(-1) / widths).detach()
    if mode != "ramp":
        slope = m * step.detach() / (edges[..., -1] - edges[..., 0])
        slopes = slope.unsqueeze(-1).expand_as(widths)
    window = _count(x.detach(), edges, axis).long() - 1
    inside = (window >= 0) & (window < m)
    window = window.clamp(0, m - 1)
    here = _pick(t, window, axis)
    line = _pick(slopes, window, axis) * (x - torch.where(inside, here, here.detach()))
    if mode == "parent":
        through = torch.ones_like(inside) if gate is None else (x > gate[0]) & (x < gate[1])
    else:
        through = inside
    line = torch.where(through & x.isfinite(), line, torch.zeros_like(line))
    return _hard(x, t, step, zero, axis) + (line - line.detach())


def soft(x: Tensor, t: Tensor, step: Tensor, widths: Tensor, zero: Tensor, k: float,
         axis: int | None) -> Tensor:
    """Return the softened staircase; arguments as in ``staircase.py``."""
    total = torch.zeros_like(x)
    for center, width in zip(t.unbind(-1), widths.detach().unbind(-1), strict=True):
        total = total + torch.sigmoid(k / _rows(width, x, axis) * (x - _rows(center, x, axis)))
    return (total - zero) * _rows(step, x, axis)


def belled(x: Tensor, t: Tensor, step: Tensor, widths: Tensor, zero: Tensor, k: float,
           axis: int | None) -> Tensor:
    """Return the staircase with the gradient of the softened one; that of the step is its own."""
    smooth = soft(x, t, step.detach(), widths, zero, k, axis)
    smooth = torch.where(smooth.isfinite(), smooth, torch.zeros_like(smooth))
    return _hard(x, t, step, zero, axis) + (smooth - smooth.detach())
