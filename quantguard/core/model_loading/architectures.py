"""Build the untrained model of an arch spec: from a library, or by a function of the user."""

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

from ..errors import LoadError
from .model_spec import ARCH_HELP, parted, split, suggestion
from .safe_pickle import working_directory_importable
from .transformers_models import build_hf

# The arguments of a library's model that a spec may set. Files of ours may contain such a spec, so
# none of these may download, read a file or choose code.
_SETTINGS = {
    "torchvision": ("num_classes", "image_size", "aux_logits", "width_mult", "dropout"),
    "timm": ("num_classes", "in_chans", "img_size", "drop_rate")}


def build_arch(spec: str) -> nn.Module:
    """Build the untrained model that an arch spec names; nothing is downloaded.

    Args:
        spec: ``torchvision:resnet18``, ``timm:NAME``, ``hf:DIR`` (a folder with transformers'
            config.json), ``package.module:factory`` or ``path/to/file.py:factory``. Modules of the
            working directory can be imported. Arguments of the factory follow a ``?``:
            ``torchvision:resnet18?num_classes=3``, ``mynet:Net?width=8&depth=3``.

    Raises:
        LoadError: the name is unknown, an import or the factory fails, or the result is no
            nn.Module.

    Example:
        >>> type(build_arch("torchvision:resnet18")).__name__
        'ResNet'
    """
    plain, settings = split(spec)
    source, name = parted(plain)
    if not source or not name:
        raise LoadError(f"{spec!r} is not an arch spec", why=_suggestion(plain), fix=ARCH_HELP)
    if source in _SETTINGS:
        _check_settings(spec, source, settings)
        return _torchvision(spec, name, settings) if source == "torchvision" else \
            _timm(spec, name, settings)
    if source == "hf":
        if settings:
            raise LoadError(f"{spec}: hf: takes no settings", fix="Change DIR/config.json.")
        return build_hf(name)
    with _importable(source):
        return _made(spec, functools.partial(_factory(spec, source, name), **settings))


def build_fitting(spec: str, state: Callable[[nn.Module], Mapping[str, Any]]) -> nn.Module:
    """Build the model of an arch spec with the number of classes of its future weights.

    Args:
        spec: an arch spec. The number of classes is only changed for models of torchvision and
            timm, and only if spec does not set it.
        state: returns the weights, by the names that they have in a model.

    Raises:
        LoadError: as in :func:`build_arch`.
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
    """Return the Python module of an arch spec's factory; None for a library's model."""
    source, name = parted(split(spec)[0])
    if source in (*_SETTINGS, "hf") or not source:
        return None
    with _importable(source):
        _factory(spec, source, name)
        return _imported(spec, source)


def _classes(model: nn.Module, state: Mapping[str, Any]) -> int | None:
    """Return the number of classes of weights if only that differs from the model's, else None."""
    shapes = [(tuple(own.shape), tuple(state[name].shape))
              for name, own in model.state_dict().items() if isinstance(state.get(name), Tensor)]
    different = [(own, saved) for own, saved in shapes if own != saved]
    if not different or any(not own or own[1:] != saved[1:] for own, saved in different):
        return None
    # The smallest, because a detector has a head with one row a class, and one with four.
    return int(min(different)[1][0])


def _check_settings(spec: str, library: str, settings: Mapping[str, Any]) -> None:
    allowed = _SETTINGS[library]
    for key, value in settings.items():
        if key not in allowed:
            raise LoadError(f"{spec}: {key} cannot be set for models of {library}",
                            fix=f"Use one of {', '.join(allowed)}; for other settings write a "
                                "factory: file.py:factory.")
        if not isinstance(value, (int, float)):
            raise LoadError(f"{spec}: {key}={value!r} is no number")


def _torchvision(spec: str, name: str, settings: Mapping[str, Any]) -> nn.Module:
    models = _import("torchvision.models", spec)
    _check_name(spec, name, models.list_models(), "torchvision's models")
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    # Nothing is downloaded, and quantized models are built as float ones.
    options: dict[str, Any] = {"weights_backbone": None} if "weights_backbone" in parameters else {}
    if "quantize" in parameters:
        options["quantize"] = False
    # By default they draw the weights from a slow truncated normal; the modules are the same.
    if name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return _made(spec, functools.partial(models.get_model, name, weights=None, **options,
                                         **settings))


def _timm(spec: str, name: str, settings: Mapping[str, Any]) -> nn.Module:
    timm = _import("timm", spec)
    # The architecture is the text before the dot; "hf-hub:" and "local-dir:" are not names.
    _check_name(spec, name.partition(".")[0], timm.list_models(), "timm's models")
    return _made(spec, functools.partial(timm.create_model, name, pretrained=False, **settings))


def _factory(spec: str, source: str, name: str) -> Any:
    """Return the function or class of a spec from its module."""
    module = _imported(spec, source)
    factory = getattr(module, name, None)
    if not callable(factory) or isinstance(factory, nn.Module):
        callables = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise LoadError(f"{spec}: {source} has no function or class {name!r}"
                        if factory is None else f"{spec}: {name} is a {type(factory).__name__}",
                        why=_nearest(name, callables),
                        fix="Name a function or class that returns the model when called "
                            "without arguments, or with those after a ?.")
    return factory


def _imported(spec: str, source: str) -> Any:
    """Import a module by its name, or from its file."""
    if not source.endswith(".py"):
        if os.path.isfile(f"{source}.py") and os.sep in source:
            source += ".py"
        else:
            return _import(source, spec)
    path = Path(source).resolve()
    if not path.is_file():
        raise LoadError(f"{spec}: {source} does not exist", fix=ARCH_HELP)
    name = ".".join([*reversed(_packages(path)), path.stem])
    imported = sys.modules.get(name)
    if imported is None:
        imported = _import(name, spec)
    if imported is not None and Path(getattr(imported, "__file__", None) or "").resolve() == path:
        return imported
    # Another module has that name: one of a library, or of another folder.
    alias = f"{path.stem}_{zlib.crc32(os.fsencode(path)):x}"
    if alias not in sys.modules:
        found = importlib.util.spec_from_file_location(alias, path)
        assert found is not None and found.loader is not None  # the name ends in .py
        module = sys.modules[alias] = importlib.util.module_from_spec(found)
        try:
            found.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[alias]
            if not isinstance(error, Exception):
                raise
            raise _not_imported(spec, source, error) from error
    return sys.modules[alias]


def _packages(path: Path) -> list[str]:
    """Return the packages that contain a file, innermost first."""
    found = []
    while (path.parent / "__init__.py").is_file():
        path = path.parent
        found.append(path.name)
    return found


@contextmanager
def _importable(source: str) -> Iterator[None]:
    """Context that can import from the working directory, and from the folder of a .py file."""
    path = Path(source).resolve()
    top = str(path.parents[len(_packages(path))])
    with working_directory_importable():
        if not source.endswith(".py") or top == os.getcwd():
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
    fix = "Correct the error in it."
    if isinstance(error, ModuleNotFoundError):
        fix = f"Install it: pip install {module}." if module == "timm" else \
            "Install it, or start in a folder from which it can be imported; a file is named by " \
            "its path: path/to/file.py:factory."
    return LoadError(f"{spec}: {module} cannot be imported",
                     why=f"{type(error).__name__}: {error}", fix=fix)


def _suggestion(name: str) -> str:
    """Return a likely arch spec for a name without a colon, as a question; or nothing."""
    if name.endswith(".py") or os.path.isfile(f"{name}.py"):
        return f"Which function or class of it builds the model? {name}:FACTORY"
    return suggestion(name)


def _check_name(spec: str, name: str, known: list[str], what: str) -> None:
    if name not in known:
        raise LoadError(f"{spec}: {name!r} is not one of {what}", why=_nearest(name, known))


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"Did you mean {' or '.join(near)}?" if near else ""
