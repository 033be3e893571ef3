"""MODEL -> nn.Module: a file or an arch spec. Reading a file never runs code that it brings."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoadError
from .pickles import read_pickle, working_directory_importable

MODEL_HELP = "a file, torchvision:NAME, timm:NAME or package.module:factory"

_STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")


def is_arch_spec(model: str) -> bool:
    """Tell whether ``model`` is an arch spec: it has a colon and no such file exists."""
    return ":" in model and not os.path.exists(model)


def is_our_file(path: str | os.PathLike[str]) -> bool:
    """Tell whether ``path`` is a zip in quantguard's own format (it holds a manifest.json)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "manifest.json" in archive.namelist()
    except (OSError, zipfile.BadZipFile, NotImplementedError):
        return False


def build_arch(spec: str) -> nn.Module:
    """Build the untrained model that an arch spec names; nothing is downloaded.

    Args:
        spec: ``torchvision:resnet18``, ``timm:NAME``, or
            ``package.module:factory``, called without arguments; the working directory is
            importable meanwhile.

    Raises:
        LoadError: an unknown name, a failing import or factory, or a result that is no nn.Module.

    Example:
        >>> type(build_arch("torchvision:resnet18")).__name__
        'ResNet'
    """
    room, colon, name = spec.partition(":")
    if not colon or not room or not name:
        raise LoadError(f"{spec!r} is not an arch spec",
                        fix="Use torchvision:NAME, timm:NAME or package.module:factory.")
    if room == "torchvision":
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
        return _made(spec, functools.partial(models.get_model, name, weights=None, **options))
    if room == "timm":
        timm = _import("timm", spec)
        # The part before the dot is the architecture; "hf-hub:" and "local-dir:" are not names.
        _check_name(spec, name.partition(".")[0], timm.list_models(), "timm's models")
        return _made(spec, functools.partial(timm.create_model, name, pretrained=False))
    with working_directory_importable():
        module = _import(room, spec)
        factory = getattr(module, name, None)
        if not callable(factory) or isinstance(factory, nn.Module):
            have = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise LoadError(f"{spec}: {room} has no function or class {name!r}"
                            if factory is None else f"{spec}: {name} is a {type(factory).__name__}",
                            why=_nearest(name, have),
                            fix="Name a function or class that returns the model when called "
                                "without arguments.")
        return _made(spec, factory)


def load_model(model: str, *, arch: str | None = None, trust: bool = False) -> nn.Module:
    """Load a model from a file or an arch spec, on the CPU and in eval mode.

    Args:
        model: an arch spec; or a file: a whole model or a state dict from ``torch.save``, or
            safetensors. A checkpoint dict is searched for ``state_dict``, ``model_state_dict``,
            ``model`` and ``net``; DataParallel and torch.compile wrappers are taken off.
        arch: arch spec of the model that a state dict fills.
        trust: let the file's pickle import and run anything.

    Raises:
        LoadError: a file that cannot be read, may not be read safely, or does not fit ``arch``.
    """
    if is_arch_spec(model):
        if arch is not None:
            raise LoadError(f"{model} is an arch spec already, and so is arch={arch!r}",
                            fix="Give a file and --arch, or an arch spec alone.")
        return build_arch(model).eval()
    path = Path(model)
    _check_file(path)
    if path.suffix == ".safetensors":
        content: object = _read_safetensors(path)
    else:
        with path.open("rb") as file:
            content = read_pickle(file, str(path), trust=trust)
    if isinstance(content, Mapping):
        content = next((content[key] for key in _STATE_KEYS
                        if isinstance(content.get(key), (Mapping, nn.Module))), content)
    if isinstance(content, nn.Module):
        if arch is not None:
            raise LoadError(f"{path} holds a whole {type(content).__name__}, not a state dict",
                            fix="Leave --arch out.")
        return _unwrap(content, path).eval()
    if not isinstance(content, Mapping) or not all(isinstance(k, str) for k in content) or not any(
            isinstance(v, Tensor) for v in content.values()):
        keys = ", ".join(map(repr, list(content)[:5])) if isinstance(content, Mapping) else ""
        raise LoadError(f"{path} holds a {type(content).__name__}"
                        + (f" with the keys {keys}" if keys else ""),
                        why="That is neither a model nor a state dict.")
    if arch is None:
        raise LoadError(f"{path} is a state dict: weights without the model they belong to",
                        fix="Name the model with --arch: torchvision:NAME, timm:NAME or "
                            "package.module:factory.")
    network = build_arch(arch)
    _fill(network, content, path, arch)
    return network.eval()


def _check_file(path: Path) -> None:
    """Raise what can be said about a file before any reader sees it."""
    if not path.exists():
        raise LoadError(f"{path} does not exist", fix=f"A model is {MODEL_HELP}.")
    if path.is_dir():
        raise LoadError(f"{path} is a directory", fix="Name the file in it.")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise LoadError(f"{path} cannot be opened", why=str(error)) from error
    if not start:
        raise LoadError(f"{path} is empty")
    if start.startswith(b"version https://git-lfs"):
        raise LoadError(f"{path} is a Git LFS pointer, not the file itself",
                        fix="Fetch the file: git lfs pull")
    if path.suffix == ".safetensors":
        return
    if start.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile as error:
            raise LoadError(f"{path} is damaged: its end is missing",
                            why=f"It starts like a file of torch.save, but: {error}.",
                            fix="Copy or download it again.") from error
        if "manifest.json" in names:
            raise LoadError(f"{path} is in quantguard's own format", fix="Use quantguard.load.")
        if any(name.endswith("/constants.pkl") for name in names):
            raise LoadError(f"{path} is a TorchScript archive (torch.jit.save)",
                            why="Its forward is compiled code without modules to convert.",
                            fix="Use the model it was scripted from.")
        if not any(name.endswith("/data.pkl") for name in names):
            raise LoadError(f"{path} is a zip, but not one of torch.save",
                            why=f"It holds {', '.join(names[:3]) or 'nothing'}.")
    elif not start.startswith(b"\x80"):  # the opcode that starts a binary pickle
        raise LoadError(f"{path} is not a model file", why=f"It starts with {start[:16]!r}.",
                        fix=f"A model is {MODEL_HELP}.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path} is not a readable safetensors file", why=str(error)) from error


def _unwrap(model: nn.Module, path: Path) -> nn.Module:
    """Take off DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        elif "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
        else:
            break
        if not isinstance(inner, nn.Module):
            raise LoadError(f"{path} holds a {type(model).__name__} around nothing")
        model = inner
    if isinstance(model, torch.jit.ScriptModule):
        raise LoadError(f"{path} holds a TorchScript module",
                        why="Its forward is compiled code without modules to convert.",
                        fix="Use the model it was scripted from.")
    return model


def _fill(model: nn.Module, state: Mapping[str, Any], path: Path, arch: str) -> None:
    """Load ``state`` into ``model``: every key and shape, or one error that lists the rest."""
    own = model.state_dict()

    def strip(key: str) -> str:
        return key.replace("_orig_mod.", "")

    while all(strip(k).startswith("module.") for k in state) and not all(
            k.startswith("module.") for k in own):
        state = {strip(k).removeprefix("module."): v for k, v in state.items()}
    state = {strip(k): v for k, v in state.items()}
    both = [(k, v, own.get(k)) for k, v in state.items()]
    shapes = [(k, tuple(v.shape), tuple(o.shape)) for k, v, o in both
              if isinstance(v, Tensor) and isinstance(o, Tensor) and v.shape != o.shape]
    # Files from before torch 0.4 lack this counter, which changes nothing in eval mode.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    problems = [f"{k} is {there} in the file and {here} in the model"
                + (": number of classes?" if there[1:] == here[1:] else "")
                for k, there, here in shapes[:3]]
    problems += [f"{len(keys)} {what}: {', '.join(keys[:3])}" + (", ..." if len(keys) > 3 else "")
                 for keys, what in ((missing, "missing from the file"),
                                    (unexpected, "not in the model")) if keys]
    if len(shapes) > 3:
        problems.append(f"{len(shapes) - 3} more shapes differ")
    if problems:
        raise LoadError(f"{path} does not fit {arch}", why="\n".join(problems),
                        fix="Name the arch that it was saved from; for another number of classes, "
                            "write a factory: --arch package.module:factory")
    # Some modules (MNASNet) need their version beside the weights; bare dicts have lost it.
    filled = type(own)(state)
    filled._metadata = own._metadata  # type: ignore[attr-defined]
    try:
        model.load_state_dict(filled, strict=False)
    except Exception as error:
        raise LoadError(f"{path} does not fit {arch}", why=str(error)) from error


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
        raise LoadError(f"{spec}: {module} cannot be imported",
                        why=f"{type(error).__name__}: {error}",
                        fix="Install it, or start where it can be imported.") from error


def _check_name(spec: str, name: str, known: list[str], what: str) -> None:
    if name not in known:
        raise LoadError(f"{spec}: {name!r} is not one of {what}", why=_nearest(name, known))


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"Did you mean {' or '.join(near)}?" if near else ""
