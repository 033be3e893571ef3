"""Inputs of a model: tensors in nested lists, tuples and dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from .errors import DataError


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU if it has none."""
    tensors: Iterator[Tensor] = iter((*model.parameters(), *model.buffers()))
    first = next(tensors, None)
    return first.device if first is not None else torch.device("cpu")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a value: itself, or those in dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for child in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(child)


def changed(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return inputs with every tensor replaced by ``change(tensor)``."""
    if isinstance(inputs, dict):
        return {name: changed(value, change) for name, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(changed(value, change) for value in inputs)
    return change(inputs) if isinstance(inputs, Tensor) else inputs


def to_device(inputs: Any, device: torch.device) -> Any:
    """Return inputs with their tensors on a device."""
    return changed(inputs, lambda x: x.to(device))


def as_model_input(inputs: Any, model: nn.Module) -> Any:
    """Return inputs on model's device, floating tensors in the type of its first weight."""
    dtype, device = input_dtype_of(model), device_of(model)
    return changed(inputs, lambda x: x.to(device, dtype if x.is_floating_point() else None))


def input_dtype_of(model: nn.Module) -> torch.dtype | None:
    """Return the type of the model's first weight, which its input needs, too; None: no weight."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def copied(inputs: Any) -> Any:
    """Return a copy of inputs, which a model may overwrite."""
    return changed(inputs, Tensor.clone)


def as_given(inputs: Any, what: str) -> Any:
    """Return a caller's tensors as ordinary ones: without graph, and not of inference mode.

    Args:
        what: subject of the error message, such as "the images are".

    Raises:
        DataError: a tensor is on the meta device.
    """
    def plain(x: Tensor) -> Tensor:
        if x.is_meta:
            raise DataError(f"{what} on the meta device, which has shapes and no values",
                            fix="Pass them on the CPU or on a GPU.")
        x = x.detach() if x.requires_grad else x
        return x.clone() if x.is_inference() else x
    return changed(inputs, plain)
