"""The tensors of a .qg file: shared ones are written once, and a skeleton has empty ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..core.errors import LoadError
from ..core.module_utils import duplicate


def unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state dict without repeated tensors, and the aliases that name a tensor again."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise LoadError(f"{name!r} in the state of {type(model).__name__} is a "
                            f"{type(value).__name__}, not a tensor")
        if is_lazy(value):
            raise LoadError(f"{name!r} in the state of {type(model).__name__} has no shape yet: "
                            "its layer is lazy", fix="Run the model once on a batch.")
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, aliases


def to_safetensors(tensors: dict[str, Tensor]) -> bytes:
    """Return tensors in the safetensors format."""
    import safetensors.torch
    return safetensors.torch.save(tensors)


def from_safetensors(content: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        ValueError: the content is damaged.
    """
    import safetensors.torch
    try:
        return safetensors.torch.load(content)
    except Exception as error:
        raise ValueError(f"weights.safetensors: {error}") from error


def _owners(model: nn.Module) -> Iterator[tuple[Any, str, Tensor]]:
    """Yield every persistent tensor with its name and the dictionary that holds it."""
    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for place in places:
            for name, value in place.items():
                if value is not None and name not in module._non_persistent_buffers_set:
                    yield place, name, value


def with_empty_tensors(model: nn.Module, to_meta: bool) -> nn.Module:
    """Replace persistent tensors by empty ones; tied ones stay tied."""
    new: dict[int, Tensor] = {}
    old = []  # a tensor that is freed could pass its id on to a new one
    for place, name, value in list(_owners(model)):
        if id(value) not in new:
            old.append(value)
            device = "meta" if to_meta else "cpu"
            empty: Tensor = torch.empty_like(value.detach(), device=device)
            if isinstance(value, nn.Parameter):
                empty = nn.Parameter(empty, value.requires_grad)
            new[id(value)] = empty
        place[name] = new[id(value)]
    return model


def materialized(model: nn.Module) -> nn.Module:
    """Return model with empty tensors in place of meta tensors; without any, a copy."""
    if any(value.is_meta for _, _, value in _owners(model)):
        return with_empty_tensors(model, to_meta=False)
    return duplicate(model)
