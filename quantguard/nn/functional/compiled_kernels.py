"""Passes over memory of the staircase, each compiled into one loop by torch.compile.

They give the same bits as ``eager_kernels``: every element of a result is one comparison and one
product, and sums are taken in double, so that their order does not show in float32. Every function
returns what it has done; the caller runs the eager kernel on the rest. Nothing is compiled where
that does not pay, where there is no C++ compiler, or where torch.compile is switched off.
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

from .kernel_bodies import (
    bell_body,
    bell_computed_body,
    bell_gradients_body,
    decode_body,
    encode_body,
    encode_computed_body,
    margin_body,
)

# Compiling takes seconds (once on a machine) and does not pay for smaller tensors.
WORTH = 1 << 20
# A loop that has been compiled already is faster than the eager kernel from this size on.
_CALL = 1 << 13
# A search is faster than this many comparisons.
_MOST = 15
# A multiple of the elements in any vector register.
_VECTOR = 64
_log = logging.getLogger("quantguard")
_ready: set[Any] = set()  # variants that have been compiled
_failed: set[Any] = set()  # variants that could not be compiled


def encode(x: Tensor, t: Tensor, edges: Tensor, step: Tensor, zero: Tensor, axis: int | None,
           computed: bool, out: Tensor, code: Tensor) -> bool:
    """Write ``step * (#{i: x > t_i} - zero)`` into out and the number of bounds below x into code.

    Args:
        x, out, code: of one shape and one gapless memory order.
        t: (m,), or (C, m) where axis is the channel dimension; edges: (m + 1,) or (C, m + 1).
        computed: whether t_i is ``step * (i - 1/2 - zero)`` to the bit.

    Returns:
        Whether it was done. It is not where compiling does not pay or fails.
    """
    m = t.shape[-1]
    if not _usable(x) or (m > _MOST and not computed):
        return False
    views = _flattened(x, axis, x, out, code)
    if computed:
        numbers = [_aligned(v, views[0]) for v in (edges[..., [0, m]], step.unsqueeze(-1))]
        return _run(encode_computed_body, (x.dtype, code.dtype, views[0].dim()), *views, *numbers,
                    zero, m)
    numbers = [_aligned(v, views[0]) for v in (t, edges, step.unsqueeze(-1))]
    return _run(encode_body, (x.dtype, m, views[0].dim()), *views, *numbers, zero)


def decode(grad: Tensor, code: Tensor, table: Tensor, zero: Tensor, axis: int | None,
           out: Tensor | None, by_window: Tensor | None, by_level: Tensor | None) -> bool:
    """Write grad times the slope into out; sum grad by window, and grad times its level.

    Args:
        grad, code, out: of one shape and one gapless memory order.
        table: (m + 2,), or (C, m + 2): the slope below all windows, in each window, above all.
        by_window: (m,) or (C, m), float64; None: not wanted, as for out and by_level.
        by_level: () or (C,), float64.

    Returns:
        Whether it was done.
    """
    m = table.shape[-1] - 2
    # One slope between two flat ends needs no look-up. On a GPU the check would wait for it.
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
    return _run(decode_body, variant, *views[:2], _aligned(table, views[0]), zero, sums, flat,
                *targets)


def bell(x: Tensor, t: Tensor, sharpness: Tensor, step: Tensor, zero: Tensor, hard: bool,
         reach: int | None, out: Tensor, slope: Tensor | None) -> int:
    """Write the staircase or its softened form into out, and the softened slope into slope.

    Args:
        x, out, slope: of one shape and one gapless memory order; slope None: not wanted.
        t, sharpness: (m,); step: ().
        hard: whether out is the staircase.
        reach: where t_i is ``step * (i - 1/2 - zero)`` to the bit, the number of thresholds on
            either side whose sigmoids are neither 0 nor 1; None: all sigmoids are computed.

    Returns:
        The number of elements that were done, in memory order. The last few are left over: they
        fill no vector, and a scalar loop would use another exponential function.
    """
    if reach is None:
        return _by_vectors(bell_body, x, (x, out, slope), (t, sharpness, step, zero), hard)
    return _by_vectors(bell_computed_body, x, (x, out, slope), (sharpness, step, zero), hard,
                       t.shape[-1], reach)


def bell_gradients(grad: Tensor, x: Tensor, t: Tensor, sharpness: Tensor, step: Tensor,
                   zero: Tensor, hard: bool, out: Tensor, shares: Tensor, by_level: Tensor) -> int:
    """Write grad times the softened slope into out; sum the gradients of thresholds and step.

    Args:
        grad, x, out: of one shape and one gapless memory order.
        t, sharpness: (m,); step: ().
        hard: whether the levels are those of the staircase or of its softened form.
        shares: (m,), float64, the gradients of the thresholds.
        by_level: (), float64, the gradient of the step.

    Returns:
        The number of elements that were done, see :func:`bell`.
    """
    return _by_vectors(bell_gradients_body, x, (grad, x, out), (t, sharpness, step, zero), hard,
                       shares, _row(by_level))


def margin(z: Tensor, t: Tensor, sharpness: Tensor, slope: Tensor, total: Tensor) -> int:
    """Add the sum of p (1 - p), p = sigma(sharpness (z - t_i)), to total; write d/dz to slope.

    Args:
        z, slope: of one shape and one gapless memory order.
        t, sharpness: (m,); total: (), float64.

    Returns:
        The number of elements that were done, see :func:`bell`.
    """
    return 0 if z.dtype == torch.float64 else \
        _by_vectors(margin_body, z, (z, slope), (t, sharpness), False, _row(total))


def _by_vectors(function: Callable[..., Any], x: Tensor, tensors: tuple[Tensor | None, ...],
                numbers: tuple[Tensor, ...], hard: bool, *rest: Any) -> int:
    """Run a pass with sigmoids over the elements that fill whole vectors; return their number."""
    m = numbers[0].shape[-1]
    if not _usable(x) or (2 * m > _MOST and function is not bell_computed_body):
        return 0
    done = x.numel() // _VECTOR * _VECTOR
    constants = [v for v in rest if isinstance(v, int)]
    variant = (x.dtype, m, hard, *constants, *(v is None for v in tensors))
    ran = _run(function, variant, *(None if v is None else _alias(v, [done]) for v in tensors),
               *(v.detach().clone() for v in numbers), hard, *rest)
    return done if ran else 0


def _usable(x: Tensor) -> bool:
    """Return whether passes over x may be compiled: a subclass of Tensor may have no memory."""
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

    It is not a view: torch.compile would compile again for other shapes of the viewed tensor.
    """
    stride = [math.prod(shape[d + 1:]) for d in range(len(shape))]
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), shape, stride)


def _aligned(values: Tensor, x: Tensor) -> Tensor:
    """Return a copy of (C, m) values, as (C, 1, m) where a dimension follows the channels."""
    return (values.unsqueeze(1) if x.dim() == 3 else values).detach().clone()


def _row(total: Tensor) -> Tensor:
    """Return a sum as (n,): code that torch 2.11 compiles does not write to 0-d tensors."""
    return total.reshape(-1)


def _run(function: Callable[..., Any], variant: tuple[Any, ...], *args: Any) -> bool:
    """Run a compiled function and return whether it ran; a failed compilation is not repeated."""
    key = function, args[0].device.type, *variant
    if key in _failed or (key not in _ready and args[0].numel() < WORTH):
        return False
    _import_compiler()
    try:
        # Function modes are for the calls of the model, not for these.
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
    """Import a module of torch's compiler, without its warning about a CUDA toolkit without a GPU.

    The warning does not concern a user who runs on the CPU; with a GPU it does not appear.
    """
    log = logging.getLogger("torch.utils.cpp_extension")
    before, log.disabled = log.disabled, True
    try:
        importlib.import_module(log.name)
    except ImportError as error:  # such as setuptools; the compiler itself reports what it needs
        _log.info("%s: %s", log.name, error)
    finally:
        log.disabled = before


@functools.cache
def _compiled(function: Callable[..., Any], *variant: Any) -> Callable[..., Any]:
    """Compile a copy of function for each variant: torch.compile limits recompilations of one."""
    assert isinstance(function, types.FunctionType)
    name = "_".join(map(str, (function.__name__, *variant)))
    clone = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    return torch.compile(clone, dynamic=True, fullgraph=True)
