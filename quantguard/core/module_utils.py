"""Check, copy and freeze modules, and restore their modes and buffers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from .errors import ConversionError
from .nested_tensors import tensors_in


def check_model(model: Any) -> None:
    """Check that model is an nn.Module and not, for example, a function.

    Raises:
        ConversionError: it is not.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"the model is a {type(model).__name__}, and must be an nn.Module",
                              fix="Call it in the forward of an nn.Module.")


def check_numbers(model: nn.Module) -> None:
    """Check that all parameters and buffers have values, and not only shapes.

    Raises:
        ConversionError: some of them are on the meta device.
    """
    empty = [name for name, value in (*model.named_parameters(), *model.named_buffers())
             if value.is_meta]
    if empty:
        more = f" (and {len(empty) - 1} more tensors)" if len(empty) > 1 else ""
        raise ConversionError(f"the model is on the meta device: {empty[0]}{more} has no values",
                              fix="Load its weights first, for example with "
                                  "load_state_dict(weights, assign=True).")


def of_other_tensors(model: nn.Module) -> tuple[str, str] | None:
    """Return name and class of a parameter of a tensor subclass, such as torchao's; or None."""
    return next(((name, type(p).__name__) for name, p in model.named_parameters()
                 if type(p).__torch_dispatch__ is not nn.Parameter.__torch_dispatch__), None)


def ordinary(model: nn.Module) -> nn.Module:
    """Return model, or a copy if some of its tensors were made in torch.inference_mode.

    Such tensors cannot be used in any computation with gradients.
    """
    inference = any(not is_lazy(value) and value.is_inference() for value in _tensors_of(model))
    return duplicate(model) if inference else model


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield every tensor in the attributes of model's modules, and in containers there."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name != "_modules":
                yield from tensors_in(value)


def duplicate(model: nn.Module) -> nn.Module:
    """Return a deep copy of model.

    Results of a forward in attributes are copied without their autograd graph; copy.deepcopy
    alone refuses them.
    """
    memo: dict[int, Any] = {}
    plain = [p for p in model.parameters() if type(p) is nn.Parameter]
    # Most of the time goes into fresh memory; threads make that three to four times faster.
    with ThreadPoolExecutor(min(4, torch.get_num_threads())) as pool:
        for parameter, clone in zip(plain, pool.map(Tensor.clone, [p.data for p in plain]),
                                   strict=True):
            memo[id(parameter)] = nn.Parameter(clone, parameter.requires_grad)
    return _deepcopied(model, memo)


class _Detaching(TorchFunctionMode):
    """Makes copy.deepcopy copy tensors that have an autograd graph, without the graph."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            value, memo = args
            if id(value) not in memo:
                memo[id(value)] = value.detach().clone()
            return memo[id(value)]
        return func(*args, **(kwargs or {}))


def _deepcopied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy of model, with replacements for some of its tensors.

    Args:
        memo: the replacement of a tensor, by the id of that tensor.

    Raises:
        ConversionError: an object in the model cannot be copied.
    """
    try:
        with _Detaching():
            return copy.deepcopy(model, memo)
    except Exception as error:  # an object in the model may raise anything
        raise ConversionError(f"{type(model).__name__} cannot be copied",
                              why=f"copy.deepcopy: {error}",
                              fix="Remove the object that cannot be copied from the model's "
                                  "attributes, or give its class a __deepcopy__.") from error


def stand_in(model: nn.Module) -> nn.Module:
    """Return a temporary copy of model that shares its parameters, and nothing else."""
    return _deepcopied(model, {id(value): value if isinstance(value, nn.Parameter)
                               else value.detach().clone() for value in _tensors_of(model)})


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of model on the meta device: shapes without values, at no cost."""
    _check_shapes(model)
    memo: dict[int, Any] = {}
    for value in _tensors_of(model):
        empty = value.detach().to("meta")
        memo[id(value)] = nn.Parameter(empty, value.requires_grad) \
            if isinstance(value, nn.Parameter) else empty
    return _deepcopied(model, memo)


def _check_shapes(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ConversionError(f"{name} of the model has no shape yet: its layer is lazy",
                                  fix="Run the model once on a batch.")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's model inside DataParallel or torch.compile wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[nn.Module]:
    """Restore the train or eval mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Set eval mode inside the context, and restore the mode of every module afterwards."""
    with modes_restored(model):
        model.eval()
        yield model


@contextmanager
def frozen(model: nn.Module, but: Iterable[nn.Parameter] = ()) -> Iterator[nn.Module]:
    """Switch ``requires_grad`` of parameters off inside the context.

    This saves time, and leaves ``.grad`` unchanged.

    Args:
        but: parameters that keep their gradient.

    Raises:
        ConversionError: a parameter is lazy, or was made in torch.inference_mode.
    """
    exceptions = {id(p) for p in but}
    named = {name: p for name, p in model.named_parameters()
             if p.requires_grad and id(p) not in exceptions}
    trained = list(named.values())
    _check_shapes(model)
    for name, parameter in named.items():
        if parameter.is_inference() and not torch.is_inference_mode_enabled():
            raise ConversionError(f"{name} of the model was made in torch.inference_mode()",
                                  why="torch allows it no gradient outside of that mode.",
                                  fix="Make the model outside, or pass copy.deepcopy(model).")
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield model
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def observers_still(model: nn.Module) -> Iterator[None]:
    """Disable the observers of torch.ao's fake quantizers inside the context.

    They are active in eval mode, too, so that each image would change the quantization grid.
    """
    flags: list[Tensor] = []
    for module in model.modules():
        flag = getattr(module, "observer_enabled", None)
        if isinstance(flag, Tensor) and callable(getattr(module, "disable_observer", None)):
            flags.append(flag)
    before = [flag.clone() for flag in flags]
    try:
        for flag in flags:
            flag.zero_()
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.copy_(value)


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Restore the values of all buffers afterwards, because a forward may change them."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
