"""Recording of one forward: which tensors are step functions of earlier ones, and their readers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import step_functions as step_fit
from .numbered_calls import NumberedCalls, Place
from .step_functions import Samples
from .tensor_samples import channel_axes, channels_at, sample_indices

# Values of a tensor that are sampled.
_SAMPLE = 8192
# A tensor with more than _TOO_MANY different values among the first _FIRST sampled is not discrete.
_FIRST, _TOO_MANY = 1024, 400
# Sampled values that are compared to find out whether a tensor has been written to.
_COMPARED = 256
# Smaller tensors have too few values to recognise a step function.
_LEAST = 32


class _Link(torch.autograd.Function):
    """Copy of y that requires a gradient, so that later results do, too."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, torch.zeros((), device=grads[0].device)


class TensorRecord:
    """What is known of one tensor in a forward.

    Attributes:
        place: where it occurred first.
        shape: its shape.
        floating: whether it is of a floating-point type.
        values: copy of the tensor, if it may be a source.
        sample: (S,) float64, some of its values, at the same indices for every tensor of a shape;
            None if one is not finite.
        discrete: whether it takes few values, many times each.
        source: the tensor that it is a step function of.
        per_tensor: whether it is one step function of its source for all channels.
        after: it is not a channelwise step function of tensors from before this call.
        readers: arguments where it is read by something else than the quantizer.
    """

    def __init__(self, place: Place, tensor: Tensor) -> None:
        self.place, self.shape, self.floating = place, tensor.shape, tensor.is_floating_point()
        self.values: Tensor | None = None
        self.sample: Tensor | None = None
        self.discrete = False
        self.source: TensorRecord | None = None
        self.per_tensor = False
        self.after = 0
        self.readers: list[Place] = []


class Recorder(NumberedCalls):
    """Mode that records the tensors of a forward, and which are step functions of which.

    Args:
        constants: ids of the parameters and buffers, which do not depend on the images.
        anchor: a number with a gradient.
    """

    def __init__(self, constants: set[int], anchor: Tensor) -> None:
        super().__init__()
        self._constants, self._anchor = constants, anchor
        # By id, together with the tensor, so that its id is not used again.
        self._records: dict[int, tuple[Tensor, TensorRecord]] = {}
        # Possible sources: continuous tensors with a gradient, by shape.
        self._sources: dict[torch.Size, list[TensorRecord]] = {}
        self._read: list[tuple[TensorRecord, Place]] = []
        self._after = 0
        self._memory: set[int] = set()
        self._generator = torch.Generator().manual_seed(1)
        self._outputs: list[TensorRecord] = []

    def found(self) -> Iterator[tuple[TensorRecord, list[Place]]]:
        """Yield each quantizer output with its readers.

        ``y + (q - y).detach()`` reads q and has its values. So of several outputs of one source
        only the last counts, and readers before it belong to the quantizer.
        """
        for record in self._outputs:
            last = max(r.place.call for r in self._outputs
                       if r.source is record.source and r.per_tensor >= record.per_tensor)
            readers = [place for place in record.readers
                       if place.call > last or record.place.call == last]
            if readers and record.source is not None:
                yield record, readers

    def relevant(self, number: int) -> bool:
        return number >= 0

    def replace_arguments(self, number: int, name: str, leaves: list[Any]) -> list[Any]:
        self._read, self._after = [], 0
        self._memory = {leaf.untyped_storage().data_ptr() for leaf in leaves
                        if type(leaf) in (Tensor, nn.Parameter)
                        and leaf.layout is torch.strided and not leaf.is_meta}
        for at, leaf in enumerate(leaves):
            record = self._record(leaf, Place(number, name, False, at))
            if record is None:
                continue
            self._after = max(self._after, record.after)
            if record.source is None:
                continue
            self._read.append((record, Place(number, name, False, at)))
            if leaf.is_floating_point() and not leaf.requires_grad and torch.is_grad_enabled() \
                    and not (name.endswith("_") and at == 0):
                leaves[at] = linked = _Link.apply(leaf, self._anchor)
                self._records[id(linked)] = linked, record
        return leaves

    def replace_result(self, number: int, name: str, result: Any) -> Any:
        read, after = self._read, self._after
        results = [(leaf, self._record(leaf, Place(number, name, True, at), after))
                   for at, leaf in enumerate(tree_leaves(result)) if isinstance(leaf, Tensor)]
        floating = any(leaf.is_floating_point() for leaf, _ in results)
        for record, place in read:
            if not floating or not record.floating:
                continue
            inside_quantizer = any(
                r is not None and r.source is not None and r.shape == record.shape
                and r.per_tensor >= record.per_tensor for _, r in results)
            if inside_quantizer:
                continue
            if not record.readers:
                self._outputs.append(record)
            record.readers.append(place)
            for _, r in results if record.per_tensor else ():
                # BatchNorm, say, makes a channelwise step function of it: no new quantizer.
                if r is not None and r is not record and not r.per_tensor:
                    r.after, r.source = max(r.after, number), None
        if isinstance(result, Tensor) and results and not name.endswith("_"):
            record_of_result = results[0][1]
            if record_of_result is not None and record_of_result.discrete \
                    and record_of_result.source is None and result.requires_grad \
                    and result.is_floating_point() and not self._shares_memory(result):
                return self._dithered(result, record_of_result)
        return result

    def _shares_memory(self, result: Tensor) -> bool:
        """Return whether a result shares the memory of an argument."""
        return result.untyped_storage().data_ptr() in self._memory

    def _dithered(self, result: Tensor, record: TensorRecord) -> Tensor:
        """Return a result with noise that takes it off its grid.

        Quantized weights put sums of products on a grid; any function of such a sum would look
        like a step function.
        """
        assert record.sample is not None
        values = record.sample.sort().values
        gaps = values[1:] - values[:-1]
        gaps = gaps[gaps > step_fit.SAME_LEVEL * (values[-1] - values[0])]
        noise = torch.rand(result.shape, generator=self._generator, dtype=torch.float64) - 0.5
        dithered = result + (noise * float(gaps.median())).to(result)
        self._record(dithered, record.place, record.after)
        return dithered

    def _record(self, value: Any, place: Place, after: int = 0) -> TensorRecord | None:
        """Return the record of a tensor, made at its first occurrence; None: not of interest."""
        if type(value) not in (Tensor, nn.Parameter) or id(value) in self._constants \
                or value.is_meta or value.numel() < _LEAST or not value.dim() \
                or value.layout is not torch.strided or value.is_complex() or value.is_quantized:
            return None
        known = self._records.get(id(value))
        with torch.no_grad():
            where = sample_indices(value.shape, _SAMPLE).to(value.device)
            numbers = value.detach().reshape(-1)
            # A tensor's version does not count writes to its .data: compare values.
            if known is not None and known[0] is value and (known[1].sample is None or torch.equal(
                    numbers[where[:_COMPARED]].double().cpu(), known[1].sample[:_COMPARED])):
                return known[1]
            sample = numbers[where].double().cpu()
        record = TensorRecord(place, value)
        self._records[id(value)] = value, record
        record.after = after
        if not bool(sample.isfinite().all()):
            return record
        record.sample = sample
        record.discrete = self._is_discrete(record)
        if record.discrete:
            self._find_source(record)
        elif value.requires_grad and value.is_floating_point():
            record.values = value.detach().clone()
            self._sources.setdefault(value.shape, []).append(record)
        return record

    def _is_discrete(self, record: TensorRecord) -> bool:
        assert record.sample is not None
        sample, where = record.sample, sample_indices(record.shape, _SAMPLE)
        axes = channel_axes(record.shape)
        if len(torch.unique(sample[:_FIRST])) > _TOO_MANY:
            axes = axes[1:]  # too many values in the tensor, but perhaps few in each channel
        return any(step_fit.has_few_levels(sample, channels_at(record.shape, where, axis))
                   for axis in axes)

    def _find_source(self, record: TensorRecord) -> None:
        """Find the first tensor of which this one is a step function."""
        where = sample_indices(record.shape, _SAMPLE)
        for axis in channel_axes(record.shape):
            channel = channels_at(record.shape, where, axis)
            for source in self._sources.get(record.shape, ()):
                if axis is not None and source.place.call < record.after:
                    continue
                assert source.sample is not None and record.sample is not None
                if step_fit.is_step_function(Samples(source.sample, record.sample, channel)):
                    record.source, record.per_tensor = source, axis is None
                    return
