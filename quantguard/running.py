"""Run a model without leaving a trace on it."""

from __future__ import annotations

import copy
import functools
import os
import platform
import random
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, ParamSpec, TypeVar

import numpy
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from .errors import ConversionError, DataError, SpecError
from .progress import heard
from .spec import plain

_P = ParamSpec("_P")
_R = TypeVar("_R")


def entry_point(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run a public function as if it were called at the top of a script.

    What the caller has switched off around it is on inside: gradients, which ``torch.no_grad`` and
    ``torch.inference_mode`` take away, and a standard error that can be written to.
    """
    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.inference_mode(False), torch.enable_grad(), heard():
            return function(*args, **kwargs)
    return call


def check_model(model: Any) -> None:
    """Refuse a function where a model is meant.

    Raises:
        ConversionError: model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"the model is a {type(model).__name__}, and must be an nn.Module",
                              fix="Call it in the forward of one.")


def check_numbers(model: nn.Module) -> None:
    """Refuse a model that has shapes and no numbers, or not all of them.

    Raises:
        ConversionError: some of its tensors are on the meta device.
    """
    empty = [name for name, value in (*model.named_parameters(), *model.named_buffers())
             if value.is_meta]
    if empty:
        raise ConversionError(f"the model is on the meta device: {empty[0]} has no numbers"
                              + f", nor have {len(empty) - 1} more tensors" * (len(empty) > 1),
                              fix="Load its weights first, such as by load_state_dict(weights, "
                                  "assign=True).")


def of_other_tensors(model: nn.Module) -> tuple[str, str] | None:
    """Return name and class of a parameter that computes in a way of its own, as torchao's do."""
    return next(((name, type(p).__name__) for name, p in model.named_parameters()
                 if type(p).__torch_dispatch__ is not nn.Parameter.__torch_dispatch__), None)


def ordinary(model: nn.Module) -> nn.Module:
    """Return model, or a copy where torch.inference_mode made tensors of it.

    These take part in no gradient outside of that mode any more.
    """
    made = any(not is_lazy(value) and value.is_inference() for value in _held(model))
    return duplicate(model) if made else model


def run(model: nn.Module, inputs: Any, where: str = "") -> Any:
    """Call model with one input, with a tuple of arguments, or with a dict of keyword arguments.

    The model gets copies of the tensors: its forward may write to what it is given.

    Raises:
        DataError: the model does not accept inputs of this shape; ``where`` says which they are.
    """
    try:
        given = copied(inputs)
        if isinstance(given, dict):
            return model(**given)
        return model(*given) if isinstance(given, tuple) else model(given)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        shape = changed(inputs, lambda x: tuple(x.shape))  # type: ignore[arg-type,return-value]
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = "Check channels and size: nothing is converted silently; --size resizes images."
        if "more than 1 value per channel" in said or "more than 1 spatial element" in said:
            fix = "A normalisation in training mode needs two images at least: give larger " \
                  "batches, and leave no last one of a single image (drop_last=True)."
        elif isinstance(error, TypeError) and isinstance(inputs, dict):
            fix = "Of a dict batch all but labels are keyword arguments of the model's forward."
        elif isinstance(error, TypeError) and "positional argument" in said:
            fix = "Its forward takes another number of inputs: yield dicts with their names, or " \
                  "bind the others into the model."
        elif "same device" in said:
            fix = "A part of the model is on another device than its first weight: use model.to."
        eaten = eaten_by(model)
        given = {x.dtype for x in tensors_in(inputs) if x.is_floating_point()} or {torch.uint8}
        if eaten is not None and eaten not in given:
            fix = f"They are {given.pop()} and its weights {eaten}: convert one of them, such as " \
                  "by model.float() or images.float()."
        raise DataError(
            f"{where}: " * bool(where) + f"the model does not accept inputs of shape {shape}",
            why=f"It says: {said}", fix=fix) from error


def picked(output: Any) -> Any:
    """Return what stands for the logits in whatever a model returns.

    A tensor itself; ``logits`` of a dict or an object; the only entry that is not None; the first
    of a tuple or list; else output as it is. Values may be those of torch.fx.
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
    there = [value for value in entries if value is not None]
    if len(there) == 1:
        return picked(there[0])
    return output[0] if isinstance(output, (tuple, list)) and output else output


def described(output: Any) -> str:
    """Return in words what a model has put out: types, names and shapes."""
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    kind = type(output).__name__
    if isinstance(output, Mapping):
        parts = [f"{k!r}: {described(v)}" for k, v in list(output.items())[:6]]
    elif isinstance(output, (tuple, list)):
        parts = [described(v) for v in output[:6]]
    else:
        return "None" if output is None else kind
    return f"a {kind} of {', '.join(parts) or 'nothing'}"


def accepts(model: nn.Module, inputs: Any) -> bool:
    """Return whether model runs on inputs in eval mode."""
    try:
        with torch.no_grad(), evaluating(model), seeded(0):
            run(model, inputs)
    except Exception:  # whatever a forward raises on what it was not made for
        return False
    return True


def _held(model: nn.Module) -> Iterator[Tensor]:
    """Yield every tensor that model's modules hold in attributes, and in containers there."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name != "_modules":
                yield from tensors_in(value)


def duplicate(model: nn.Module) -> nn.Module:
    """Return a deep copy of model.

    Results that a forward has left in attributes, which copy.deepcopy refuses while they hang on
    their graph, are copied without it.
    """
    memo: dict[int, Any] = {}
    plain = [p for p in model.parameters() if type(p) is nn.Parameter]
    # Fresh memory takes most of the time, and threads share that: three to four times faster.
    with ThreadPoolExecutor(min(4, torch.get_num_threads())) as pool:
        for parameter, twin in zip(plain, pool.map(Tensor.clone, [p.data for p in plain]),
                                   strict=True):
            memo[id(parameter)] = nn.Parameter(twin, parameter.requires_grad)
    return _deepcopied(model, memo)


class _Detaching(TorchFunctionMode):
    """Let copy.deepcopy copy results, wherever they are kept, without the graph they hang on."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            value, memo = args
            if id(value) not in memo:
                memo[id(value)] = value.detach().clone()
            return memo[id(value)]
        return func(*args, **(kwargs or {}))


def _deepcopied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy of model in which memo's values stand for the tensors of these ids.

    Raises:
        ConversionError: it holds something that cannot be copied.
    """
    try:
        with _Detaching():
            return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the objects raise that it holds
        raise ConversionError(f"{type(model).__name__} cannot be copied",
                              why=f"copy.deepcopy: {error}",
                              fix="Take what cannot be copied out of the model's attributes, or "
                                  "give its class a __deepcopy__.") from error


def stand_in(model: nn.Module) -> nn.Module:
    """Return a copy of model to be run and thrown away; only the parameters are model's own."""
    return _deepcopied(model, {id(value): value if isinstance(value, nn.Parameter)
                               else value.detach().clone() for value in _held(model)})


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of model on the meta device: shapes without numbers, at no cost."""
    _check_shapes(model)
    memo: dict[int, Any] = {}
    for value in _held(model):
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
def modes_kept(model: nn.Module) -> Iterator[nn.Module]:
    """Put every module's own train or eval mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Hold model in eval mode, and put every module's own mode back."""
    with modes_kept(model):
        model.eval()
        yield model


@contextmanager
def frozen(model: nn.Module, but: Iterable[nn.Parameter] = ()) -> Iterator[nn.Module]:
    """Hold parameters, but for some, free of gradients: these cost time, ``.grad`` must not change.

    Raises:
        ConversionError: a parameter that is nothing yet, or that would not take its gradient back.
    """
    left = {id(p) for p in but}
    named = {name: p for name, p in model.named_parameters()
             if p.requires_grad and id(p) not in left}
    trained = list(named.values())
    _check_shapes(model)
    for name, parameter in named.items():
        if parameter.is_inference() and not torch.is_inference_mode_enabled():
            raise ConversionError(f"{name} of the model was made in torch.inference_mode()",
                                  why="torch lets it take no gradient outside of that any more.",
                                  fix="Make the model outside, or give copy.deepcopy(model).")
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield model
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _nothing_kept(*_: Any, **__: Any) -> Iterator[None]:
    """Stand for what torch.utils.checkpoint does before and after a function that it calls."""
    yield


class _Inlined:
    @staticmethod
    def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:
        return function(*args)


_CHECKPOINTS = {"CheckpointFunction": _Inlined,
                "_checkpoint_without_reentrant_generator": _nothing_kept,
                "_checkpoint_without_reentrant_generator_impl": _nothing_kept}


@contextmanager
def checkpoints_inlined() -> Iterator[None]:
    """Keep what activation checkpoints would compute again, inside the context.

    The gradient is the same, for more memory. A reentrant checkpoint has none in the images alone,
    and any other counts on the same operations, in the same modes, when it computes again.
    Whichever form a model uses (``checkpoint_sequential``, Hugging Face's
    ``gradient_checkpointing_enable``), it ends in these functions of torch's.
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
    """Return whether there was no memory: CUDA says so by a type of its own, the CPU in words."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or \
        "can't allocate memory" in str(error) or "not enough memory" in str(error)


def lacks_derivative(error: RuntimeError) -> bool:
    """Return whether a backward met an operation that torch, or who wrote it, gave no derivative.

    torch has one type for all that may go wrong in a backward.
    """
    return isinstance(error, NotImplementedError) or any(
        said in str(error) for said in ("not implemented", "no autograd formula", "no backward"))


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed inside the context, and leave the caller's random numbers as they were."""
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed)
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


@contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back inside the context; what is yielded raises it, called between two steps.

    A second Ctrl-C is not held back. Outside the main thread, where no signal comes, nothing is
    changed.
    """
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def interrupt() -> None:
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def device_of(model: nn.Module) -> torch.device:
    """Return where model is: where its first parameter or buffer is, else the CPU."""
    tensors: Iterator[Tensor] = iter((*model.parameters(), *model.buffers()))
    first = next(tensors, None)
    return first.device if first is not None else torch.device("cpu")


def usable_device(device: str | torch.device) -> torch.device:
    """Return device, if it is there.

    Raises:
        SpecError: an unknown device, or one that this machine or this torch does not have.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise SpecError(f"device {str(device)!r} cannot be used",
                        why=str(error).strip().splitlines()[0]) from None
    if found.type == "meta":
        raise SpecError("device 'meta' cannot be used", why="It holds shapes and no numbers.")
    return found


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a value: itself, or those in dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def changed(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return inputs (a tensor, or dicts, lists and tuples of them) with every tensor changed."""
    if isinstance(inputs, dict):
        return {name: changed(value, change) for name, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(changed(value, change) for value in inputs)
    return change(inputs) if isinstance(inputs, Tensor) else inputs


def to_device(inputs: Any, device: torch.device) -> Any:
    """Move the tensors of inputs."""
    return changed(inputs, lambda x: x.to(device))


def as_eaten(inputs: Any, model: nn.Module) -> Any:
    """Return inputs on model's device, their floating tensors in the type of its first weight."""
    kind, device = eaten_by(model), device_of(model)
    return changed(inputs, lambda x: x.to(device, kind if x.is_floating_point() else None))


def eaten_by(model: nn.Module) -> torch.dtype | None:
    """Return the type of the model's first weight, which is what it eats; None: it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def copied(inputs: Any) -> Any:
    """Return inputs that a model may overwrite."""
    return changed(inputs, Tensor.clone)


def as_given(inputs: Any, what: str) -> Any:
    """Return a caller's tensors as plain numbers: with no graph, and not of inference mode.

    Raises:
        DataError: a tensor on the meta device; ``what`` says which it is.
    """
    def plain(x: Tensor) -> Tensor:
        if x.is_meta:
            raise DataError(f"{what} on the meta device, which holds shapes and no numbers",
                            fix="Give them on the CPU or on a GPU.")
        x = x.detach() if x.requires_grad else x
        return x.clone() if x.is_inference() else x
    return changed(inputs, plain)


def environment(device: torch.device) -> dict[str, str]:
    """Return the versions and the machine that a result depends on."""
    import importlib.metadata as metadata
    place = str(device)
    if device.type == "cuda":
        place += f", {torch.cuda.get_device_name(device)}"
    versions = {name: metadata.version(name) for name in ("torch", "foolbox", "numpy")}
    return {"python": platform.python_version(), **versions, "quantguard": version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores", "device": place,
            "threads": str(torch.get_num_threads())}


def version() -> str:
    """Return the installed version of the distribution."""
    import importlib.metadata as metadata
    try:
        return metadata.version("torch-quantguard")
    except metadata.PackageNotFoundError:
        return "not installed"


def seconds_of(budget: float | str) -> float:
    """Return a budget in seconds: a number, or one with ``s``, ``m`` or ``h`` after it.

    Raises:
        SpecError: it is no time above 0.
    """
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([smh]?)\s*", budget)
        seconds = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    else:
        budget = plain(budget)
        seconds = float(budget) if isinstance(budget, (int, float)) else 0.0
    if not 0 < seconds < float("inf"):
        raise SpecError(f"budget {budget!r} is no time", fix="Give it as '90s', '5m' or '2h'.")
    return seconds


class true_float32:
    """Hold TF32 and bfloat16 off: they round by more than separates a survivor from the fallen.

    A GPU's and a CPU's matrix products and convolutions, whatever the user lets them do elsewhere.
    """

    def __enter__(self) -> None:
        self.before = [getattr(*place) for place, _ in self._places()]
        for place, exact in self._places():
            setattr(*place, exact)

    def __exit__(self, *_: Any) -> None:
        for (place, _), value in zip(self._places(), self.before, strict=True):
            setattr(*place, value)

    @staticmethod
    def _places() -> list[tuple[tuple[Any, str], Any]]:
        from torch.backends import cuda, cudnn, mkldnn
        return [((cuda.matmul, "allow_tf32"), False), ((cudnn, "allow_tf32"), False),
                ((mkldnn.matmul, "fp32_precision"), "ieee"),  # type: ignore[attr-defined]
                ((mkldnn.conv, "fp32_precision"), "ieee")]  # type: ignore[attr-defined]


@contextmanager
def measuring(model: nn.Module, seed: int) -> Iterator[None]:
    """Hold everything still that a measurement must neither change nor depend on."""
    with evaluating(model), frozen(model), seeded(seed), true_float32(), observers_still(model):
        yield


@contextmanager
def observers_still(model: nn.Module) -> Iterator[None]:
    """Switch off, inside the context, what torch.ao's fake quantizers learn from each input.

    They observe in eval mode, too, until somebody disables it: each image would move the grid.
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
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put every buffer back to what it was, after forwards that change some."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
