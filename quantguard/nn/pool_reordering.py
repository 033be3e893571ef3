"""Max-pooling before the activation instead of after it: the same function, with less work.

Most values in a pool's window are tied after a quantizer, and the gradient goes to the first of the
tied values, which is an arbitrary direction for an attack. A quantizer is monotone, so
``pool(q(z)) = q(pool(z))``, and on the right the largest z gets the gradient. A ReLU has no such
ties (tied values of 0 have no gradient); there only the work is less, a quarter for a 2x2 pool.

``q(z)`` is not computed at all where only a pool reads it. The first forward finds out: it computes
``q(z)`` and records whether anything but a pool has read it. If not, the next forward returns a
stand-in (``deferred_activation``), which computes ``q(z)`` when anything else reads it; later
forwards then compute it at once. Such a reader sees no difference but the type, a Tensor subclass.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .contexts import switched
from .deferred_activation import ActivationCall, DeferredFunction, DeferredResult, materialised
from .functional.staircase import needs_plain_operations
from .memory_format import is_compiled
from .quant_activation import QuantActivation

_POOLS = {f"{kind}max_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3)}
_RELUS = (F.relu, torch.relu, Tensor.relu)
# The number of recent activations whose results a pool may still read: more would hold memory.
_LATEST = 4
# For each model: whether only a pool reads the result of the n-th activation of a forward.
_only_pooled: weakref.WeakKeyDictionary[nn.Module, dict[int, bool]] = weakref.WeakKeyDictionary()


class _PoolsFirstMode(TorchFunctionMode):
    """Function mode that computes a max-pool of an activation as the activation of the max-pool.

    Args:
        only_pooled: whether only a pool reads the result of the n-th activation of a forward;
            written to as well. None: no result is deferred, and ReLUs are left alone.
    """

    def __init__(self, only_pooled: dict[int, bool] | None) -> None:
        super().__init__()
        self._defers = only_pooled is not None
        self._only_pooled = {} if only_pooled is None else only_pooled
        self._number = 0
        self._latest: deque[tuple[int, ActivationCall]] = deque(maxlen=_LATEST)
        self._pooled_calls: dict[int, ActivationCall] = {}  # of activations not yet known
        self._stand_ins: list[weakref.ref[DeferredResult]] = []

    def begin(self) -> None:
        """Record what the last forward has shown, and begin the next one."""
        pooled, stand_ins, count = self._pooled_calls, self._stand_ins, self._number
        self.forget()
        for number, call in pooled.items():
            self._only_pooled.setdefault(number,
                                         not call.read_elsewhere and call.unchanged())
        for number in range(count):
            self._only_pooled.setdefault(number, False)
        for reference in stand_ins:  # still referenced: computed before thresholds change
            materialised(reference())

    def forget(self) -> None:
        """Drop all references to tensors of a forward."""
        self._pooled_calls, self._stand_ins, self._number = {}, [], 0
        self._latest.clear()

    def quantized(self, quantizer: QuantActivation, z: Tensor) -> Tensor:
        """Return z quantized, or a stand-in for it."""
        z, state = materialised(z), quantizer._state
        if not _deferrable(z):
            return quantizer.quantized(z)
        return self._activated(z, lambda v: quantizer.quantized(v, state), *quantizer.parameters())

    def _activated(self, z: Tensor, compute: Callable[[Tensor], Tensor],
                   *parameters: Tensor) -> Tensor:
        number, self._number = self._number, self._number + 1
        only_pooled = self._only_pooled.get(number) \
            if self._defers and not needs_plain_operations() else False
        if compute is _relu and only_pooled is False:
            return compute(z)  # a ReLU has no ties: its order does not matter
        call = ActivationCall(z, compute, lambda: self._only_pooled.__setitem__(number, False))
        self._latest.append((number, call))
        if not only_pooled:
            return call.store(compute(z))
        result: Tensor = DeferredFunction.apply(call, z, *parameters)
        self._stand_ins.append(weakref.ref(result))  # type: ignore[arg-type]
        return result

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._defers and torch.compiler.is_compiling():  # a function that the forward calls
            return func(*args, **kwargs)
        if self._defers and func in _RELUS and len(args) == 1 and not kwargs.get("inplace") \
                and _deferrable(args[0]):
            return self._activated(args[0], _relu)
        if getattr(func, "__name__", "") in _POOLS and args and _only_maxima(args, kwargs):
            for number, call in self._latest:
                if call.produced(args[0]):
                    pooled = self._pooled(number, call, func, args, kwargs)
                    if pooled is not None:
                        return pooled
        if self._defers and len(self._only_pooled) < self._number:  # some are not known yet
            read = {id(v) for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
            for _, call in [*self._latest, *self._pooled_calls.items()]:
                call.read_elsewhere |= id(call.value) in read
        return func(*args, **kwargs)

    def _pooled(self, number: int, call: ActivationCall, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the activation of the pool; None where the pool returns more than one tensor."""
        if number not in self._only_pooled:
            self._pooled_calls[number] = call
        if call.compute is _relu and call.value is not None:
            return func(call.value, *args[1:], **kwargs)
        found = func(call.z, *args[1:], **kwargs)
        return call.compute(found) if isinstance(found, Tensor) else None


def _only_maxima(args: Any, kwargs: Any) -> bool:
    """Return whether a pool returns only maxima, of windows that are never all padding."""
    dilation = kwargs.get("dilation", args[4] if len(args) > 4 else 1)
    return not kwargs.get("return_indices") and all(
        d == 1 for d in (dilation if isinstance(dilation, (tuple, list)) else [dilation]))


def _deferrable(z: Any) -> bool:
    """Return whether z is a plain tensor with a version, outside of saved-tensor hooks.

    Activation checkpointing, for example, repeats the operations in its backward, where this mode
    is not active.
    """
    if type(z) is not Tensor or torch.is_inference_mode_enabled() or z.is_inference():
        return False
    return torch.compiler.is_compiling() or \
        torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def _relu(z: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return torch.relu(z)


@contextmanager
def pools_first(model: nn.Module) -> Iterator[nn.Module]:
    """Move max-pools that follow an activation in front of it, inside the context.

    This holds for quantizers and for ReLUs that do not write to their input. The outputs of the
    model do not change. Pools that return indices stay where they are.
    """
    mode = _PoolsFirstMode(None if is_compiled(model) else _only_pooled.setdefault(model, {}))
    handle = model.register_forward_pre_hook(lambda *_: mode.begin())
    try:
        with switched(model, {"override": mode.quantized}), mode:
            yield model
        mode.begin()
    finally:
        mode.forget()
        handle.remove()
