"""One process of several, as Hugging Face Accelerate or torchrun starts them; or the only one.

Every process holds the whole model and goes through the same steps; of each batch it takes a part.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import SpecError


@dataclass(frozen=True)
class World:
    """Hold which process this is, of how many.

    Attributes:
        rank: from 0; process 0 writes and speaks.
        size: how many there are.
        device: where this one runs, if that was chosen for it.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        """Return whether this process writes files and shows progress."""
        return self.rank == 0

    def part(self, rows: Any) -> Any:
        """Return this process's rows of a tensor or list that all of them hold."""
        return rows if self.size == 1 else rows[self.rank :: self.size]

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over processes, of tensors of one shape."""
        if self.size == 1:
            return value
        from accelerate.utils import reduce
        summed: Tensor = reduce(value.contiguous(), "sum")
        return summed

    def total_of(self, number: float) -> float:
        """Return the sum over processes of a number."""
        if self.size == 1:
            return number
        return float(self.total(torch.tensor(number, dtype=torch.float64, device=self._where())))

    def joined(self, rows: np.ndarray, mine: np.ndarray) -> np.ndarray:
        """Return rows (N, ...) with each process's own taken from it.

        Args:
            mine: (N,) which are this process's; no row is two processes'.
        """
        if self.size == 1:
            return rows
        kept = np.where(mine.reshape(-1, *[1] * (rows.ndim - 1)), rows, np.zeros_like(rows))
        # a row that nobody has stays as it is, which is the same everywhere
        owned = self.total(torch.from_numpy(mine.astype(np.int64)).to(self._where())).cpu().numpy()
        wide = kept.astype(np.int64) if kept.dtype == bool else kept
        summed = self.total(torch.from_numpy(wide).to(self._where())).cpu().numpy()
        owned = owned.astype(bool).reshape(-1, *[1] * (rows.ndim - 1))
        return np.where(owned, summed.astype(rows.dtype), rows)

    def agreed(self, value: Any) -> Any:
        """Return what process 0 has, a plain Python value."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list
        return broadcast_object_list([value])[0]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every parameter's gradient by the sum over processes."""
        if self.size == 1:
            return
        for parameter in parameters:  # in one order everywhere; one that nobody used costs a 0
            if parameter.requires_grad:
                gradient = parameter.grad
                parameter.grad = self.total(torch.zeros_like(parameter) if gradient is None
                                            else gradient)

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace floating tensors by their means over processes, in place."""
        floating = [t for t in tensors if t.is_floating_point()] if self.size > 1 else []
        for kind in {t.dtype: None for t in floating}:  # many small sums would each wait
            some = [t for t in floating if t.dtype == kind]
            means = self.total(torch.cat([t.reshape(-1) for t in some])) / self.size
            parts = torch.tensor_split(means, np.cumsum([t.numel() for t in some]).tolist()[:-1])
            for tensor, mean in zip(some, parts, strict=True):
                tensor.copy_(mean.view_as(tensor))

    @torch.no_grad()
    def same(self, model: nn.Module) -> None:
        """Give every process the state of process 0's model."""
        if self.size > 1:
            from accelerate.utils import broadcast
            for value in model.state_dict().values():
                value.copy_(broadcast(value.contiguous()))

    def _where(self) -> torch.device:
        return self.device or torch.device("cpu")


@functools.cache
def world() -> World:
    """Return what this process is; one that nobody started with others is alone.

    Raises:
        SpecError: it was started with others, and Accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    try:
        from accelerate import PartialState
    except ImportError:
        raise SpecError("several processes need Hugging Face Accelerate",
                        fix="pip install accelerate") from None
    state: Any = PartialState(cpu=not torch.cuda.is_available())
    return World(state.process_index, state.num_processes, state.device)
