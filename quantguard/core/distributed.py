"""The processes of a distributed run, as Hugging Face Accelerate or torchrun starts them.

Every process has the whole model and takes the same steps, each on its own shard of the batch. A
process that was started alone is a run of size 1.
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
class Distributed:
    """Rank of this process and size of the run, with the collective operations it needs.

    Attributes:
        rank: from 0; process 0 is the main process, which writes files and shows progress.
        size: number of processes.
        device: the device of this process, where the launcher chose one.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def shard(self, rows: Any) -> Any:
        """Return this process's rows of a tensor or list that all processes have."""
        return rows if self.size == 1 else rows[self.rank :: self.size]

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over processes of tensors of one shape."""
        if self.size == 1:
            return value
        from accelerate.utils import reduce
        summed: Tensor = reduce(value.contiguous(), "sum")
        return summed

    def total_of(self, number: float) -> float:
        """Return the sum of a number over processes."""
        if self.size == 1:
            return number
        device = self._sum_device()
        return float(self.total(torch.tensor(number, dtype=torch.float64, device=device)))

    def joined(self, rows: np.ndarray, mine: np.ndarray) -> np.ndarray:
        """Return rows (N, ...) merged from all processes.

        Args:
            mine: (N,) mask of the rows that this process computed. No two processes share a row;
                rows that no process computed are equal everywhere and stay as they are.
        """
        if self.size == 1:
            return rows
        device = self._sum_device()
        own = np.where(mine.reshape(-1, *[1] * (rows.ndim - 1)), rows, np.zeros_like(rows))
        owned = self.total(torch.from_numpy(mine.astype(np.int64)).to(device)).cpu().numpy()
        wide = own.astype(np.int64) if own.dtype == bool else own
        summed = self.total(torch.from_numpy(wide).to(device)).cpu().numpy()
        owned = owned.astype(bool).reshape(-1, *[1] * (rows.ndim - 1))
        return np.where(owned, summed.astype(rows.dtype), rows)

    def agreed(self, value: Any) -> Any:
        """Return process 0's value of a plain Python object."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list
        return broadcast_object_list([value])[0]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every parameter's gradient by the sum over processes."""
        if self.size == 1:
            return
        for parameter in parameters:  # every process needs the same order; unused ones add zeros
            if parameter.requires_grad:
                gradient = parameter.grad
                parameter.grad = self.total(torch.zeros_like(parameter) if gradient is None
                                            else gradient)

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace floating tensors by their means over processes, in place."""
        floating = [t for t in tensors if t.is_floating_point()] if self.size > 1 else []
        for dtype in {t.dtype: None for t in floating}:  # one sum per type, not one per tensor
            group = [t for t in floating if t.dtype == dtype]
            means = self.total(torch.cat([t.reshape(-1) for t in group])) / self.size
            pieces = torch.tensor_split(means, np.cumsum([t.numel() for t in group]).tolist()[:-1])
            for tensor, mean in zip(group, pieces, strict=True):
                tensor.copy_(mean.view_as(tensor))

    @torch.no_grad()
    def same(self, model: nn.Module) -> None:
        """Copy the state of process 0's model to the models of all processes."""
        if self.size > 1:
            from accelerate.utils import broadcast
            for value in model.state_dict().values():
                value.copy_(broadcast(value.contiguous()))

    def _sum_device(self) -> torch.device:
        return self.device or torch.device("cpu")


@functools.cache
def distributed() -> Distributed:
    """Return rank and size of this process; without a launcher that is rank 0 of 1.

    Raises:
        SpecError: several processes were started, and Accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Distributed()
    try:
        from accelerate import PartialState
    except ImportError:
        raise SpecError("several processes need Hugging Face Accelerate",
                        fix="pip install accelerate") from None
    state: Any = PartialState(cpu=not torch.cuda.is_available())
    return Distributed(state.process_index, state.num_processes, state.device)
