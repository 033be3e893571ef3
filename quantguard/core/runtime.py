"""The environment of a run: seeds, devices, precision, interruptions and versions."""

from __future__ import annotations

import functools
import os
import platform
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import numpy
import torch
import torch.utils.checkpoint
from torch import nn

from .errors import SpecError
from .module_utils import evaluating, frozen, observers_still
from .progress import heard
from .specs import plain

_P = ParamSpec("_P")
_R = TypeVar("_R")


def entry_point(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator for public functions: run them independently of the caller's contexts.

    Inside, gradients are enabled even under ``torch.no_grad`` and ``torch.inference_mode``, and
    there is a standard error that can be written to.
    """
    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.inference_mode(False), torch.enable_grad(), heard():
            return function(*args, **kwargs)
    return call


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all random numbers inside the context, and restore the caller's generators."""
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
    """Defer Ctrl-C inside the context.

    The yielded function raises a deferred KeyboardInterrupt; call it between two steps. A second
    Ctrl-C is not deferred. Other threads than the main one get no signals: nothing changes there.
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


def usable_device(device: str | torch.device) -> torch.device:
    """Return device as a torch.device, after a check that it works.

    Raises:
        SpecError: the device is unknown, or this machine or this torch does not have it.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise SpecError(f"device {str(device)!r} cannot be used",
                        why=str(error).strip().splitlines()[0]) from None
    if found.type == "meta":
        raise SpecError("device 'meta' cannot be used", why="It has shapes and no values.")
    return found


def environment(device: torch.device) -> dict[str, str]:
    """Return the versions and the machine on which a result depends."""
    import importlib.metadata as metadata
    device_name = str(device)
    if device.type == "cuda":
        device_name += f", {torch.cuda.get_device_name(device)}"
    versions = {name: metadata.version(name) for name in ("torch", "foolbox", "numpy")}
    return {"python": platform.python_version(), **versions, "quantguard": version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores", "device": device_name,
            "threads": str(torch.get_num_threads())}


def version() -> str:
    """Return the installed version of this package."""
    import importlib.metadata as metadata
    try:
        return metadata.version("torch-quantguard")
    except metadata.PackageNotFoundError:
        return "not installed"


def seconds_of(budget: float | str) -> float:
    """Return a time budget in seconds.

    Args:
        budget: seconds, or text of a number and ``s``, ``m`` or ``h``.

    Raises:
        SpecError: it is not a time above 0.
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
    """Context in which float32 products and convolutions do not use TF32 or bfloat16.

    Their rounding errors are larger than the margin by which some images survive. The settings
    for GPU and CPU are restored afterwards.
    """

    def __enter__(self) -> None:
        self.before = [getattr(*setting) for setting, _ in self._settings()]
        for setting, exact in self._settings():
            setattr(*setting, exact)

    def __exit__(self, *_: Any) -> None:
        for (setting, _), value in zip(self._settings(), self.before, strict=True):
            setattr(*setting, value)

    @staticmethod
    def _settings() -> list[tuple[tuple[Any, str], Any]]:
        from torch.backends import cuda, cudnn, mkldnn
        return [((cuda.matmul, "allow_tf32"), False), ((cudnn, "allow_tf32"), False),
                ((mkldnn.matmul, "fp32_precision"), "ieee"),  # type: ignore[attr-defined]
                ((mkldnn.conv, "fp32_precision"), "ieee")]  # type: ignore[attr-defined]


@contextmanager
def measuring(model: nn.Module, seed: int) -> Iterator[None]:
    """Context of a measurement that is reproducible and leaves the model unchanged.

    Eval mode, no gradients of parameters, seeded random numbers, exact float32, and fake quantizers
    without observers.
    """
    with evaluating(model), frozen(model), seeded(seed), true_float32(), observers_still(model):
        yield
