"""Max-pooling before the staircase instead of after it: the same function, with a gradient.

Behind a staircase most of a pool's window is tied, and the gradient goes to one of the tied values,
whichever comes first: it says little about where the image should move. A staircase is monotone,
so ``pool(q(z)) = q(pool(z))``, and there the largest z gets the gradient. ``q(z)`` is computed
still: others may read it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .activation import QuantActivation, staircases
from .contexts import switched

_POOLS = {f"{kind}max_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3)}
# Staircases whose results a pool may still read: more, and their memory would be held for long.
_LATEST = 4


class _PoolsFirst(TorchFunctionMode):
    """Answer a max-pool of what a staircase put out by the staircase of the pool."""

    def __init__(self) -> None:
        super().__init__()
        self._latest: deque[tuple[Tensor, Tensor, tuple[int, int], QuantActivation]] = \
            deque(maxlen=_LATEST)

    def note(self, y: Tensor, staircase: QuantActivation, z: Tensor) -> None:
        """Remember that staircase made y of z; written to later, neither is what it was."""
        if not y.is_inference() and not z.is_inference():
            self._latest.append((y, z, (y._version, z._version), staircase))

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _POOLS and not kwargs.get("return_indices") and args:
            for y, z, versions, staircase in self._latest:
                if args[0] is y and (y._version, z._version) == versions:
                    return staircase.quantized(func(z, *args[1:], **kwargs))
        return func(*args, **kwargs)


@contextmanager
def pools_first(model: nn.Module) -> Iterator[nn.Module]:
    """Pool before quantizing wherever model pools right after, inside the context.

    What model computes does not change, but for pools that return indices, which stay where they
    are. A model without staircases is left as it is.
    """
    if not staircases(model):
        yield model
        return
    mode = _PoolsFirst()
    with switched(model, {"noted": mode.note}), mode:
        yield model
