"""Test of possible quantizers: replace their source by other values, and fit step functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import step_functions as step_fit
from .numbered_calls import NumberedCalls, Place
from .step_functions import Samples, Steps
from .step_recorder import TensorRecord
from .tensor_samples import channel_axes, channels_at, sample_indices

# Pairs (z, y) that are added in each forward.
_SAMPLE = 65536
# Width of the bracket around a threshold, over z's range, that is narrow enough.
_NARROW = 1e-5


class SourceReplacer(NumberedCalls):
    """Mode that replaces sources by other values, and records what readers get.

    Args:
        sources: new values (of the source's shape) by place.
        readers: places to record.

    Attributes:
        read: recorded tensors by place.
    """

    def __init__(self, sources: dict[Place, Tensor], readers: set[Place]) -> None:
        super().__init__()
        self._sources, self._readers = sources, readers
        self._calls = {place.call for place in (*sources, *readers)}
        # By id of the source, with the source itself, so that its id is not used again.
        self._replacements: dict[int, tuple[Tensor, Tensor]] = {}
        self.read: dict[Place, Tensor] = {}

    def relevant(self, number: int) -> bool:
        return number >= 0 and (number in self._calls or bool(self._replacements))

    def replace_arguments(self, number: int, name: str, leaves: list[Any]) -> list[Any]:
        for at, leaf in enumerate(leaves):
            place = Place(number, name, False, at)
            if place in self._sources and isinstance(leaf, Tensor):
                self._replace(leaf, self._sources[place])
            if isinstance(leaf, Tensor) and id(leaf) in self._replacements:
                leaf = leaves[at] = self._replacements[id(leaf)][1]
            if place in self._readers and isinstance(leaf, Tensor):
                self.read[place] = leaf.detach().clone()
        return leaves

    def replace_result(self, number: int, name: str, result: Any) -> Any:
        for at, leaf in enumerate(tree_leaves(result)):
            place = Place(number, name, True, at)
            if place in self._sources and isinstance(leaf, Tensor):
                self._replace(leaf, self._sources[place])
        return result

    def _replace(self, tensor: Tensor, values: Tensor) -> None:
        if tensor.shape == values.shape:
            # A clone is no leaf of autograd's, so that the forward may write to it.
            replacement = values.to(tensor.dtype).requires_grad_().clone()
            self._replacements[id(tensor)] = tensor, replacement


class Candidate:
    """Possible quantizer under test: pairs of source z and output y collected so far.

    Args:
        record: the recorded output.
        readers: arguments where it is read.

    Attributes:
        axes: channel axes along which all pairs fit a step function; None is one for all channels.
    """

    def __init__(self, record: TensorRecord, readers: Sequence[Place]) -> None:
        assert record.source is not None
        self.source, self.readers = record.source.place, tuple(readers)
        self.shape = record.shape
        assert record.source.values is not None
        self.values = record.source.values
        self.where = sample_indices(self.shape, _SAMPLE)
        self.z: list[Tensor] = []
        self.y: list[Tensor] = []
        self.axes = channel_axes(self.shape)
        rows = self._by_channel(self.values)
        self.low, self.high = rows.amin(1).double(), rows.amax(1).double()

    def _by_channel(self, values: Tensor) -> Tensor:
        """Return (C, values of a channel)."""
        return values.transpose(0, 1).flatten(1) if values.dim() > 1 else values.reshape(1, -1)

    def _samples(self, axis: int | None) -> Samples:
        channel = channels_at(self.shape, self.where, axis).repeat(len(self.z))
        return Samples(torch.cat(self.z), torch.cat(self.y), channel)

    def add(self, z: Tensor, y: Tensor) -> None:
        """Add pairs, and drop the axes along which y is no longer a step function."""
        where = self.where.to(y.device)
        self.z.append(z.reshape(-1)[where].double().cpu())
        self.y.append(y.detach().reshape(-1)[where].double().cpu())
        self.axes = [axis for axis in self.axes if step_fit.is_step_function(self._samples(axis))]

    def initial_values(self, generator: torch.Generator) -> Tensor:
        """Return values for z: half are its own, shuffled; the others cover a wider range."""
        rows = self._by_channel(self.values.cpu())
        order = torch.rand(rows.shape, generator=generator).argsort(1)
        shuffled = rows.gather(1, order)
        return self._as_source(torch.where(
            torch.rand(rows.shape, generator=generator) < 0.5, shuffled.double(),
            self._uniform(rows.shape, generator)))

    def _uniform(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        low, high = self.low.cpu(), self.high.cpu()
        reach = 0.25 * (high - low)
        share = torch.rand(shape, generator=generator, dtype=torch.float64)
        return (low - reach).unsqueeze(1) + share * (high - low + 2 * reach).unsqueeze(1)

    def _as_source(self, rows: Tensor) -> Tensor:
        """Return (C, values of a channel) in the source's shape and type."""
        if len(self.shape) < 2:
            values = rows.reshape(self.shape)
        else:
            images, channels, *rest = self.shape
            values = rows.reshape(channels, images, *rest).transpose(0, 1)
        return values.contiguous().to(self.values).detach()

    def narrowing_values(self, generator: torch.Generator) -> Tensor | None:
        """Return values for z that narrow the brackets of thresholds, or None if all are narrow."""
        axis = self.axes[0]
        low, high, channel = step_fit.brackets(self._samples(axis))
        span = float((self.high - self.low).max())
        if not len(low) or bool((high - low <= _NARROW * span).all()):
            return None
        every = channels_at(self.shape, torch.arange(math.prod(self.shape)), axis)
        counts = torch.bincount(channel, minlength=int(every.max()) + 1)
        starts = counts.cumsum(0) - counts
        pick = (torch.rand(every.shape, generator=generator) * counts[every]).long()
        at = (starts[every] + pick).clamp_max(len(low) - 1)
        share = torch.rand(every.shape, generator=generator, dtype=torch.float64)
        inside = (low[at] + share * (high[at] - low[at])).reshape(self.shape)
        rows = self._by_channel(inside)
        uniform = self._uniform(rows.shape, generator)
        # Some values look for thresholds that were missed; channels without any have no brackets.
        explore = (torch.rand(rows.shape, generator=generator) < 0.15) | self._by_channel(
            (counts[every] == 0).reshape(self.shape))
        return self._as_source(torch.where(explore, uniform, rows))

    def fit(self) -> Steps | None:
        """Return the step function that fits all pairs, or None."""
        if not self.axes:
            return None
        axis = self.axes[0]
        return step_fit.fit(self._samples(axis), 1 if axis is None else self.shape[axis], axis)
