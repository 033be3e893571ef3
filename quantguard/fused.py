"""The staircase's passes over memory, each compiled into one loop by torch.compile.

The same numbers as block by block: every element of a result is one comparison and one product,
and sums are taken in double, so that their order does not show in float32. Where nothing can be
compiled (no C++ compiler; torch.compile switched off), block by block is the only way.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import blockwise

# Smaller tensors take too little time for what compiling takes: seconds, once a machine.
WORTH = 1 << 20
# From here on what has been compiled already is faster than block by block.
_CALL = 1 << 13
# More thresholds than this are found faster by a search.
_MOST = 15
# Elements of a vector register, at most, and then some.
_VECTOR = 64
_log = logging.getLogger("quantguard")
_ready: set[Any] = set()  # what has been compiled
_failed: set[Any] = set()  # what could not be


def encode(x: Tensor, t: Tensor, edges: Tensor, step: Tensor, zero: Tensor, axis: int | None,
           computed: bool, out: Tensor, code: Tensor) -> bool:
    """Write ``step * (#{i: x > t_i} - zero)`` into out and the number of bounds below x into code.

    Args:
        x, out, code: of one shape and one gapless memory order.
        t: (m,), or (C, m) where axis is the channel dimension; edges: (m + 1,) or (C, m + 1).
        computed: whether t_i is ``step * (i - 1/2 - zero)`` to the bit.

    Returns:
        Whether it was done: False where it is not worth compiling, or cannot be.
    """
    m = t.shape[-1]
    if not _usable(x) or (m > _MOST and not computed):
        return False
    views = _flattened(x, axis, x, out, code)
    if computed:
        numbers = [_aligned(v, views[0]) for v in (edges[..., [0, m]], step.unsqueeze(-1))]
        return _run(_encode_computed, (x.dtype, code.dtype, views[0].dim()), *views, *numbers,
                    zero, m)
    numbers = [_aligned(v, views[0]) for v in (t, edges, step.unsqueeze(-1))]
    return _run(_encode, (x.dtype, m, views[0].dim()), *views, *numbers, zero)


def decode(grad: Tensor, code: Tensor, table: Tensor, zero: Tensor, axis: int | None,
           out: Tensor | None, by_window: Tensor | None, by_level: Tensor | None) -> bool:
    """Write grad times its window's slope into out; add up grad by window, and times its level.

    Args:
        grad, code, out: of one shape and one gapless memory order.
        table: (m + 2,), or (C, m + 2): the slope below all windows, in each, above all.
        by_window: (m,) or (C, m), float64.
        by_level: () or (C,), float64.

    Returns:
        Whether it was done.
    """
    m = table.shape[-1] - 2
    # One slope between two flat ends needs no choice. To look would wait for another device.
    flat = grad.device.type == "cpu" and axis is None and _flat(table.tolist())
    simple = flat and by_window is None
    if not _usable(grad) or (m > _MOST and not simple):
        return False
    views = _flattened(grad, axis, grad, code, *([] if out is None else [out]))
    targets = (None if out is None else views[2], by_window,
               None if by_level is None else _row(by_level))
    sums = (0,) if views[0].dim() < 3 else (0, 2)
    variant = (grad.dtype, code.dtype, 0 if simple else m, views[0].dim(), flat,
               *(v is None for v in targets))
    return _run(_decode, variant, *views[:2], _aligned(table, views[0]), zero, sums, flat, *targets)


def bell(x: Tensor, t: Tensor, sharpness: Tensor, step: Tensor, zero: Tensor, hard: bool,
         reach: int | None, out: Tensor, slope: Tensor | None) -> int:
    """Write the staircase (hard) or its softened twin into out, and the twin's slope into slope.

    Args:
        x, out, slope: of one shape and one gapless memory order; slope None: it is not wanted.
        t, sharpness: (m,); step: ().
        reach: where t_i is ``step * (i - 1/2 - zero)`` to the bit, how many thresholds on either
            side are not yet 0 or 1; None: all are looked at.

    Returns:
        How many elements were done, in memory order. The last few are left over: what is no whole
        vector would be computed by another exponential function.
    """
    if reach is None:
        return _by_vectors(_bell, x, (x, out, slope), (t, sharpness, step, zero), hard)
    return _by_vectors(_bell_computed, x, (x, out, slope), (sharpness, step, zero), hard,
                       t.shape[-1], reach)


def bell_gradients(grad: Tensor, x: Tensor, t: Tensor, sharpness: Tensor, step: Tensor,
                   zero: Tensor, hard: bool, out: Tensor, shares: Tensor, by_level: Tensor) -> int:
    """Write grad times the twin's slope into out; add up thresholds' gradients, and grad by level.

    Args:
        grad, x, out: of one shape and one gapless memory order.
        t, sharpness: (m,); step: (); hard: whether the level is the staircase's, or its twin's.
        shares: (m,), float64; by_level: (), float64.

    Returns:
        How many elements were done, as :func:`bell` does.
    """
    return _by_vectors(_bell_gradients, x, (grad, x, out), (t, sharpness, step, zero), hard,
                       shares, _row(by_level))


def near(z: Tensor, t: Tensor, sharpness: Tensor, slope: Tensor, total: Tensor) -> int:
    """Add the sum of p (1 - p), p = sigma(sharpness (z - t_i)), to total; write its slope in z.

    Args:
        z, slope: of one shape and one gapless memory order.
        t, sharpness: (m,); total: (), float64.

    Returns:
        How many elements were done, as :func:`bell` does.
    """
    return 0 if z.dtype == torch.float64 else \
        _by_vectors(_near, z, (z, slope), (t, sharpness), False, _row(total))


def _by_vectors(function: Callable[..., Any], x: Tensor, tensors: tuple[Tensor | None, ...],
                numbers: tuple[Tensor, ...], hard: bool, *rest: Any) -> int:
    """Run a pass with sigmoids over as many elements as fill vectors; return how many."""
    m = numbers[0].shape[-1]
    if not _usable(x) or (2 * m > _MOST and function is not _bell_computed):
        return 0
    done = x.numel() // _VECTOR * _VECTOR
    constants = [v for v in rest if isinstance(v, int)]
    variant = (x.dtype, m, hard, *constants, *(v is None for v in tensors))
    ran = _run(function, variant, *(None if v is None else _alias(v, [done]) for v in tensors),
               *(v.detach().clone() for v in numbers), hard, *rest)
    return done if ran else 0


def _usable(x: Tensor) -> bool:
    """Return whether passes over x are compiled; a subclass of Tensor may have no memory."""
    return type(x) in (Tensor, nn.Parameter) and x.numel() >= min(WORTH, _CALL) \
        and x.device.type in ("cpu", "cuda") and not _switched_off()


def _flat(table: list[float]) -> bool:
    return table[0] == table[-1] == 0 and min(table[1:-1]) == max(table[1:-1])


@functools.cache
def _switched_off() -> bool:
    from torch._dynamo import config
    return bool(config.disable)


def _flattened(x: Tensor, axis: int | None, *tensors: Tensor) -> list[Tensor]:
    """Return aliases of tensors in memory order: (n,), (outer, C, inner), or (outer, C)."""
    view = [x.numel()]
    if axis is not None:
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        shape, at = [x.shape[d] for d in order], order.index(axis)
        view = [math.prod(shape[:at]), shape[at]]
        if math.prod(shape[at + 1:]) > 1:
            view.append(math.prod(shape[at + 1:]))
    return [_alias(v, view) for v in tensors]


def _alias(x: Tensor, shape: list[int]) -> Tensor:
    """Return the start of x's memory in another shape.

    It is no view: torch.compile would compile again for other shapes of what is viewed.
    """
    stride = [math.prod(shape[d + 1:]) for d in range(len(shape))]
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), shape, stride)


def _aligned(values: Tensor, x: Tensor) -> Tensor:
    """Return a copy of (C, m) values: (C, 1, m) where a dimension follows that of the channels."""
    return (values.unsqueeze(1) if x.dim() == 3 else values).detach().clone()


def _row(total: Tensor) -> Tensor:
    """Return a view of a sum that is no scalar: torch 2.11 computes with scalars and drops them."""
    return total.reshape(-1)


def _run(function: Callable[..., Any], variant: tuple[Any, ...], *args: Any) -> bool:
    """Run a compiled function; what cannot be compiled is not tried again."""
    key = function, args[0].device.type, *variant
    if key in _failed or (key not in _ready and args[0].numel() < WORTH):
        return False
    _import_compiler()
    try:
        # Modes that watch a model's calls are for the model's calls.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            _compiled(*key)(*args)
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        _failed.add(key)
        _log.info("%s is not compiled: %s", function.__name__, str(error).partition("\n")[0])
        return False
    _ready.add(key)
    return True


@functools.cache
def _import_compiler() -> None:
    """Import what torch's compiler does, without its warning of a CUDA toolkit and no GPU.

    Nobody has asked for a GPU: where there is one there is no such warning.
    """
    log = logging.getLogger("torch.utils.cpp_extension")
    before, log.disabled = log.disabled, True
    try:
        importlib.import_module(log.name)
    except ImportError as error:  # without setuptools, say; the compiler tells what it needs
        _log.info("%s: %s", log.name, error)
    finally:
        log.disabled = before


@functools.cache
def _compiled(function: Callable[..., Any], *variant: Any) -> Callable[..., Any]:
    """Compile a copy of function for each variant: torch.compile compiles one only so often."""
    assert isinstance(function, types.FunctionType)
    name = "_".join(map(str, (function.__name__, *variant)))
    twin = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    return torch.compile(twin, dynamic=True, fullgraph=True)


def _encode(x: Tensor, out: Tensor, code: Tensor, t: Tensor, edges: Tensor, step: Tensor,
            zero: Tensor) -> None:
    # Floats are vectorised; as integers the same selections take five times as long.
    wide = x.float()
    count, edge = torch.zeros_like(wide), edges[..., 0]
    for i in range(t.shape[-1]):
        above = wide > t[..., i]
        count = torch.where(above, i + 1.0, count)
        edge = torch.where(above, edges[..., i + 1], edge)
    out.copy_(torch.where(wide != wide, wide, (count - zero) * step[..., 0]))
    # Between two thresholds there is one edge: left or right of it.
    code.copy_(2 * count + (wide > edge).float())


def _found(wide: Tensor, size: Tensor, zero: Tensor, m: int) -> Tensor:
    guess = (wide / size + (zero + 0.5)).floor().clamp(0, m)  # right, or one off
    up, down = wide > size * (guess + 0.5 - zero), wide <= size * (guess - 0.5 - zero)
    return (guess + up.float() - down.float()).clamp(0, m)


def _encode_computed(x: Tensor, out: Tensor, code: Tensor, ends: Tensor, step: Tensor,
                     zero: Tensor, m: int) -> None:
    wide, size = x.float(), step[..., 0]
    count = _found(wide, size, zero, m)
    edge = (size * (count - 0.5 - zero) + size * (count + 0.5 - zero)) / 2
    edge = torch.where(count > m - 1, ends[..., 1], torch.where(count < 1, ends[..., 0], edge))
    out.copy_(torch.where(wide != wide, wide, (count - zero) * size))
    code.copy_(torch.where(wide != wide, 0.0, 2 * count + (wide > edge).float()))


def _sigmoid(u: Tensor) -> Tensor:
    return torch.sigmoid(u.clamp(max=blockwise.FAR))


def _bell(x: Tensor, out: Tensor, slope: Tensor | None, t: Tensor, sharpness: Tensor,
          step: Tensor, zero: Tensor, hard: bool) -> None:
    wide = x.float()
    value, total, count = (torch.zeros_like(wide) for _ in range(3))
    for i in range(t.shape[-1]):
        s = _sigmoid((wide - t[i]) * sharpness[i])
        value = value + s
        total = total + s * (1 - s) * sharpness[i]
        count = count + (wide > t[i]).float()
    if slope is not None:
        slope.copy_(total * step)
    if hard:
        out.copy_(torch.where(wide != wide, wide, (count - zero) * step))
    else:
        out.copy_((value - zero) * step)


def _bell_computed(x: Tensor, out: Tensor, slope: Tensor | None, sharpness: Tensor, step: Tensor,
                   zero: Tensor, hard: bool, m: int, reach: int) -> None:
    wide = x.float()
    first = (wide / step + (zero + 0.5)).floor().clamp(-reach, m + reach)
    below = (first - reach).clamp(0, m)  # whose sigmoids are 1
    value, total = torch.zeros_like(wide), torch.zeros_like(wide)
    for offset in range(1 - reach, reach + 1):
        i = first + offset
        s = _sigmoid((wide - step * (i - 0.5 - zero)) * sharpness[0])
        s = torch.where((i > 0) & (i <= m), s, 0.0)
        value = value + s
        total = total + s * (1 - s) * sharpness[0]
    if slope is not None:
        slope.copy_(torch.where(wide != wide, wide, total * step))
    if hard:
        count = _found(wide, step, zero, m)
        out.copy_(torch.where(wide != wide, wide, (count - zero) * step))
    else:
        out.copy_(torch.where(wide != wide, wide, (value + below - zero) * step))


def _bell_gradients(grad: Tensor, x: Tensor, out: Tensor, t: Tensor, sharpness: Tensor,
                    step: Tensor, zero: Tensor, hard: bool, shares: Tensor,
                    by_level: Tensor) -> None:
    wide, up, sums = x.float(), grad.float(), []
    total, value = torch.zeros_like(wide), torch.zeros_like(wide)
    for i in range(t.shape[-1]):
        s = _sigmoid((wide - t[i]) * sharpness[i])
        part = s * (1 - s) * sharpness[i] * (up * step)
        sums.append(part.double().sum())
        total = total + part
        value = value + ((wide > t[i]).float() if hard else s)
    out.copy_(total)
    shares.sub_(torch.stack(sums))
    by_level.add_((up * (value - zero)).double().sum())


def _near(z: Tensor, slope: Tensor, t: Tensor, sharpness: Tensor, _hard: bool,
          total: Tensor) -> None:
    wide = z.float()
    bells, steep = torch.zeros_like(wide), torch.zeros_like(wide)
    for i in range(t.shape[-1]):
        p = _sigmoid((wide - t[i]) * sharpness[i])
        bell = p * (1 - p)
        bells = bells + bell
        steep = steep + bell * (1 - 2 * p) * sharpness[i]
    slope.copy_(steep)
    total.add_(bells.double().sum())


def _decode(grad: Tensor, code: Tensor, table: Tensor, zero: Tensor, sums: tuple[int, ...],
            flat: bool, out: Tensor | None, by_window: Tensor | None,
            by_level: Tensor | None) -> None:
    wide, place = grad.float(), code.float()
    m = table.shape[-1] - 2
    if out is not None and flat:
        out.copy_(wide * torch.where((place > 0) & (place <= 2 * m), table[1], 0.0))
    elif out is not None:
        slope = torch.where(place > 0, table[..., 1], table[..., 0])
        for i in range(1, m + 1):
            slope = torch.where(place > 2 * i, table[..., i + 1], slope)
        out.copy_(wide * slope)
    if by_window is not None:
        parts = [torch.where((place > 2 * i) & (place <= 2 * i + 2), wide, 0.0).double().sum(sums)
                 for i in range(m)]
        by_window.copy_(torch.stack(parts, -1))
    if by_level is not None:
        by_level.copy_((wide.double() * ((place * 0.5).floor() - zero).double()).sum(sums))
