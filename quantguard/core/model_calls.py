"""Call a model: pass its inputs, find the logits in its output, explain torch's errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.fx import Proxy

from .errors import DataError
from .module_utils import evaluating
from .nested_tensors import changed, copied, input_dtype_of, tensors_in
from .runtime import seeded


def run(model: nn.Module, inputs: Any, where: str = "") -> Any:
    """Call model with one input, with a tuple of arguments, or with a dict of keyword arguments.

    The model gets copies of the tensors, because its forward may write to them.

    Args:
        where: where the inputs are from, for the message of an error.

    Raises:
        DataError: the model does not accept inputs of this shape.
    """
    try:
        arguments = copied(inputs)
        if isinstance(arguments, dict):
            return model(**arguments)
        return model(*arguments) if isinstance(arguments, tuple) else model(arguments)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        shape = changed(inputs, lambda x: tuple(x.shape))  # type: ignore[arg-type,return-value]
        message = first_line(error)
        fix = "Check channels and size: nothing is converted silently; --size resizes images."
        if "more than 1 value per channel" in message or "more than 1 spatial element" in message:
            fix = "A normalisation in training mode needs at least two images: use larger " \
                  "batches, and drop a last batch of one image (drop_last=True)."
        elif isinstance(error, TypeError) and isinstance(inputs, dict):
            fix = "All entries of a dict batch except labels are passed to the model's forward " \
                  "as keyword arguments."
        elif isinstance(error, TypeError) and "positional argument" in message:
            fix = "Its forward takes another number of inputs: yield dicts with their names, or " \
                  "bind the others in a wrapper module."
        elif "same device" in message:
            fix = "One submodule is on another device than the first weight: use model.to."
        model_input = input_dtype_of(model)
        dtypes = {x.dtype for x in tensors_in(inputs) if x.is_floating_point()} or {torch.uint8}
        if model_input is not None and model_input not in dtypes:
            fix = f"They are {dtypes.pop()} and its weights {model_input}: convert one of them, " \
                  "for example with model.float() or images.float()."
        prefix = f"{where}: " if where else ""
        raise DataError(f"{prefix}the model does not accept inputs of shape {shape}",
                        why=f"It raises: {message}", fix=fix) from error


def picked(output: Any) -> Any:
    """Return the logits in a model's output.

    These are, in this order: the output itself if it is a tensor; ``logits`` of a dict or an
    object; the only entry that is not None; the first entry of a tuple or list. Any other output
    is returned unchanged. Values may also be proxies of torch.fx.
    """
    if isinstance(output, (Tensor, Proxy)):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if named is not None:
        return picked(named)
    entries: list[Any] = []
    if isinstance(output, Mapping):
        entries = list(output.values())
    elif isinstance(output, (tuple, list)):
        entries = list(output)
    elif is_dataclass(output):
        entries = [getattr(output, field.name) for field in fields(output)]
    present = [value for value in entries if value is not None]
    if len(present) == 1:
        return picked(present[0])
    return output[0] if isinstance(output, (tuple, list)) and output else output


def described(output: Any) -> str:
    """Return a description of a model's output: types, names and shapes."""
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    kind = type(output).__name__
    if isinstance(output, Mapping):
        entries = [f"{k!r}: {described(v)}" for k, v in list(output.items())[:6]]
    elif isinstance(output, (tuple, list)):
        entries = [described(v) for v in output[:6]]
    else:
        return "None" if output is None else kind
    return f"a {kind} of {', '.join(entries) or 'nothing'}"


def accepts(model: nn.Module, inputs: Any) -> bool:
    """Return whether model runs on inputs in eval mode."""
    try:
        with torch.no_grad(), evaluating(model), seeded(0):
            run(model, inputs)
    except Exception:  # a forward may raise anything on inputs it does not support
        return False
    return True


def _without_recomputation(*_: Any, **__: Any) -> Iterator[None]:
    """Replacement for torch's generator around a non-reentrant checkpoint: it does nothing."""
    yield


class _Inlined:
    """Replacement for torch's reentrant CheckpointFunction: it calls the function."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:
        return function(*args)


_CHECKPOINTS = {"CheckpointFunction": _Inlined,
                "_checkpoint_without_reentrant_generator": _without_recomputation,
                "_checkpoint_without_reentrant_generator_impl": _without_recomputation}


@contextmanager
def checkpoints_inlined() -> Iterator[None]:
    """Turn activation checkpoints off inside the context: nothing is recomputed in the backward.

    The gradient is the same, and takes more memory. With checkpoints, a reentrant one has no
    gradient in the images alone, and a non-reentrant one fails if the recomputation runs in
    another mode. All forms (``checkpoint_sequential``, Hugging Face's
    ``gradient_checkpointing_enable``) call the functions of torch that are replaced here.
    """
    module: Any = torch.utils.checkpoint
    before = {name: getattr(module, name) for name in _CHECKPOINTS if hasattr(module, name)}
    try:
        for name in before:
            setattr(module, name, _CHECKPOINTS[name])
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out. CUDA raises an own type; the CPU a RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or \
        "can't allocate memory" in str(error) or "not enough memory" in str(error)


def lacks_derivative(error: RuntimeError) -> bool:
    """Return whether a backward failed at an operation without a derivative.

    torch raises a RuntimeError for everything that goes wrong in a backward, so the message
    decides.
    """
    return isinstance(error, NotImplementedError) or any(
        text in str(error) for text in ("not implemented", "no autograd formula", "no backward"))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
