"""Arch spec -> untrained nn.Module: torchvision, timm, transformers, or a factory of one's own."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .errors import LoadError
from .model_spec import ARCH_HELP, parted, split, suggestion
from .pickles import working_directory_importable
from .transformers_models import build_hf

# What a spec may set of a library's model. A file of ours may name such a spec, so that nothing is
# here that could download, read a file or choose code.
_SETTINGS = {
    "torchvision": ("num_classes", "image_size", "aux_logits", "width_mult", "dropout"),
    "timm": ("num_classes", "in_chans", "img_size", "drop_rate")}


def build_arch(spec: str) -> nn.Module:
    """Build the untrained model that an arch spec names; nothing is downloaded.

    Args:
        spec: ``torchvision:resnet18``, ``timm:NAME``, ``hf:DIR`` (a folder with transformers'
            config.json), ``package.module:factory`` or ``path/to/file.py:factory``; the working
            directory is importable meanwhile. Behind a ``?`` stands what the factory is called
            with, by default nothing: ``torchvision:resnet18?num_classes=3``,
            ``mynet:Net?width=8&depth=3``.

    Raises:
        LoadError: an unknown name, a failing import or factory, or a result that is no nn.Module.

    Example:
        >>> type(build_arch("torchvision:resnet18")).__name__
        'ResNet'
    """
    plain, settings = split(spec)
    room, name = parted(plain)
    if not room or not name:
        raise LoadError(f"{spec!r} is not an arch spec", why=_meant(plain), fix=ARCH_HELP)
    if room in _SETTINGS:
        _check_settings(spec, room, settings)
        return _torchvision(spec, name, settings) if room == "torchvision" else \
            _timm(spec, name, settings)
    if room == "hf":
        if settings:
            raise LoadError(f"{spec}: hf: takes no settings", fix="Change DIR/config.json.")
        return build_hf(name)
    with _importable(room):
        return _made(spec, functools.partial(_factory(spec, room, name), **settings))


def build_fitting(spec: str, state: Callable[[nn.Module], Mapping[str, Any]]) -> nn.Module:
    """Build what an arch spec names, with as many classes as the weights that it will get.

    Args:
        spec: an arch spec. Only torchvision's and timm's models are built for another number of
            classes, and only where spec does not say how many.
        state: returns the weights by the names that they have in a model.

    Raises:
        LoadError: as :func:`build_arch`.
    """
    model = build_arch(spec)
    plain, settings = split(spec)
    if parted(plain)[0] not in _SETTINGS or "num_classes" in settings:
        return model
    classes = _classes(model, state(model))
    if classes is None:
        return model
    other = build_arch(f"{spec}{'&' if settings else '?'}num_classes={classes}")
    return other if _classes(other, state(other)) is None else model


def module_of(spec: str) -> Any:
    """Return the Python module that an arch spec's factory stands in; None: a library's model."""
    room, name = parted(split(spec)[0])
    if room in (*_SETTINGS, "hf") or not room:
        return None
    with _importable(room):
        _factory(spec, room, name)
        return _imported(spec, room)


def _classes(model: nn.Module, state: Mapping[str, Any]) -> int | None:
    """Return the classes that weights are for, where model's last layers have other ones."""
    shapes = [(tuple(own.shape), tuple(state[name].shape))
              for name, own in model.state_dict().items() if isinstance(state.get(name), Tensor)]
    wrong = [(here, there) for here, there in shapes if here != there]
    if not wrong or any(not here or here[1:] != there[1:] for here, there in wrong):
        return None
    # Of a detector's heads one has a row per class, another four.
    return int(min(wrong)[1][0])


def _check_settings(spec: str, room: str, settings: Mapping[str, Any]) -> None:
    allowed = _SETTINGS[room]
    for key, value in settings.items():
        if key not in allowed:
            raise LoadError(f"{spec}: {key} cannot be set of {room}'s models",
                            fix=f"What can be: {', '.join(allowed)}; for more, write a factory: "
                                "file.py:factory.")
        if not isinstance(value, (int, float)):
            raise LoadError(f"{spec}: {key}={value!r} is no number")


def _torchvision(spec: str, name: str, settings: Mapping[str, Any]) -> nn.Module:
    models = _import("torchvision.models", spec)
    _check_name(spec, name, models.list_models(), "torchvision's models")
    taken = inspect.signature(models.get_model_builder(name)).parameters
    # Nothing is downloaded, and the quantized ones come as the float networks that they are.
    options: dict[str, Any] = {"weights_backbone": None} if "weights_backbone" in taken else {}
    if "quantize" in taken:
        options["quantize"] = False
    # Their default fills the weights from a slow truncated normal; the modules are the same.
    if name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return _made(spec, functools.partial(models.get_model, name, weights=None, **options,
                                         **settings))


def _timm(spec: str, name: str, settings: Mapping[str, Any]) -> nn.Module:
    timm = _import("timm", spec)
    # The part before the dot is the architecture; "hf-hub:" and "local-dir:" are not names.
    _check_name(spec, name.partition(".")[0], timm.list_models(), "timm's models")
    return _made(spec, functools.partial(timm.create_model, name, pretrained=False, **settings))


def _factory(spec: str, room: str, name: str) -> Any:
    """Return the function or class that a spec names in a module."""
    module = _imported(spec, room)
    factory = getattr(module, name, None)
    if not callable(factory) or isinstance(factory, nn.Module):
        have = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise LoadError(f"{spec}: {room} has no function or class {name!r}"
                        if factory is None else f"{spec}: {name} is a {type(factory).__name__}",
                        why=_nearest(name, have),
                        fix="Name a function or class that returns the model when called "
                            "without arguments, or with those behind a ?.")
    return factory


def _imported(spec: str, room: str) -> Any:
    """Import a module by its name, or from its file."""
    if not room.endswith(".py"):
        if os.path.isfile(f"{room}.py") and os.sep in room:
            room += ".py"
        else:
            return _import(room, spec)
    path = Path(room).resolve()
    if not path.is_file():
        raise LoadError(f"{spec}: {room} does not exist", fix=ARCH_HELP)
    name = ".".join([*reversed(_packages(path)), path.stem])
    there = sys.modules.get(name)
    if there is None:
        there = _import(name, spec)
    if there is not None and Path(getattr(there, "__file__", None) or "").resolve() == path:
        return there
    # Another module has that name: a library's, or one of another folder.
    alias = f"{path.stem}_{zlib.crc32(os.fsencode(path)):x}"
    if alias not in sys.modules:
        found = importlib.util.spec_from_file_location(alias, path)
        assert found is not None and found.loader is not None  # of a file that ends in .py
        module = sys.modules[alias] = importlib.util.module_from_spec(found)
        try:
            found.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[alias]
            if not isinstance(error, Exception):
                raise
            raise _not_imported(spec, room, error) from error
    return sys.modules[alias]


def _packages(path: Path) -> list[str]:
    """Return the packages around a file, the innermost first."""
    found = []
    while (path.parent / "__init__.py").is_file():
        path = path.parent
        found.append(path.name)
    return found


@contextmanager
def _importable(room: str) -> Iterator[None]:
    """Import from the working directory, and from the folder of a file with Python code."""
    path = Path(room).resolve()
    top = str(path.parents[len(_packages(path))])
    with working_directory_importable():
        if not room.endswith(".py") or top == os.getcwd():
            yield
            return
        sys.path.insert(0, top)
        try:
            yield
        finally:
            if top in sys.path:
                sys.path.remove(top)


def _made(spec: str, factory: Any) -> nn.Module:
    try:
        model = factory()
    except Exception as error:
        raise LoadError(f"{spec} failed while building the model",
                        why=f"{type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise LoadError(f"{spec} returned a {type(model).__name__}, not an nn.Module")
    return model


def _import(module: str, spec: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise _not_imported(spec, module, error) from error


def _not_imported(spec: str, module: str, error: Exception) -> LoadError:
    fix = "Mend what it says."
    if isinstance(error, ModuleNotFoundError):
        fix = f"Install it: pip install {module}." if module == "timm" else \
            "Install it, or start where it can be imported; a file is named by its path: " \
            "path/to/file.py:factory."
    return LoadError(f"{spec}: {module} cannot be imported",
                     why=f"{type(error).__name__}: {error}", fix=fix)


def _meant(name: str) -> str:
    """Return what somebody may have meant by a name without a colon."""
    if name.endswith(".py") or os.path.isfile(f"{name}.py"):
        return f"What builds the model in it? {name}:FACTORY"
    return suggestion(name)


def _check_name(spec: str, name: str, known: list[str], what: str) -> None:
    if name not in known:
        raise LoadError(f"{spec}: {name!r} is not one of {what}", why=_nearest(name, known))


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"Did you mean {' or '.join(near)}?" if near else ""
