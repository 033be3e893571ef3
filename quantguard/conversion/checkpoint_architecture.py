"""Rebuild the float model of a .qg file from its arch, skeleton, configuration or class."""

from __future__ import annotations

import importlib
import io
import shlex
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import LoadError
from ..core.model_loading.architectures import build_fitting
from ..core.model_loading.safe_pickle import read_pickle, working_directory_importable
from ..core.model_loading.transformers_models import from_settings
from ..core.module_utils import duplicate, unwrap
from .checkpoint_weights import with_empty_tensors

# Factories that a file may name; any other could run arbitrary code.
SAFE_ARCHES = ("torchvision:", "timm:")


def build_float_model(manifest: dict[str, Any], skeleton: bytes | None, model: nn.Module | None,
                      where: str, state: dict[str, Tensor], trust: bool) -> nn.Module:
    """Return the float model of a .qg file.

    Raises:
        LoadError: only the user's own code can build it.
    """
    if model is not None:
        return unwrap(model)
    arch, name = manifest["arch"], str(manifest["class"])
    if arch is not None and (trust or arch.startswith(SAFE_ARCHES)):
        return build_fitting(arch, lambda _: state)
    if skeleton is not None:
        read = read_pickle(io.BytesIO(skeleton), where)
        if isinstance(read, nn.Module):
            return read
    if manifest.get("config"):  # missing in files of the first versions
        return from_settings(name, manifest["config"], where)
    try:
        if arch is not None and "?" in arch:  # the file chooses the arguments
            raise LoadError(f"{arch} builds it.")
        return _instance_of(name, trust)
    except LoadError as error:
        module, _, short = name.rpartition(".")
        spec = arch or ("package.module:factory" if "<" in module else
                        f"{'file.py' if module == '__main__' else module}:{short}")
        raise LoadError(
            f"{where} holds a {name}, which only your own code can build",
            why=f"{error.what} Loading a file imports nothing that the file chooses.",
            fix=f"On the command line: --arch {shlex.quote(spec)}, or --trust; in Python: "
                + ("" if "?" in spec else "import its module first, or ")
                + "quantguard.load(path, model=float_model), or trust=True.") from error


def _instance_of(name: str, trust: bool) -> nn.Module:
    """Create a model of a class that a file names.

    The class must be imported already; with trust, its module is imported.

    Raises:
        LoadError: the class is not imported, is not a module's, or cannot be created without
            arguments; ``what`` is the reason in one sentence.
    """
    home, _, short = name.rpartition(".")
    if trust:
        with working_directory_importable():
            try:
                importlib.import_module(home)
            except Exception as error:  # imported code may raise any error
                raise LoadError(f"{home} cannot be imported ({type(error).__name__}: {error})."
                                ) from error
    found = vars(sys.modules[home]).get(short) if home in sys.modules else None
    if found is None:
        raise LoadError(f"{name} is not imported.")
    if not isinstance(found, type) or not issubclass(found, nn.Module) \
            or found.__module__ != home:
        raise LoadError(f"{name} is no class of a model.")
    try:
        return found()
    except Exception as error:  # a constructor may raise any error
        raise LoadError(f"{name}() failed ({type(error).__name__}: {error}).") from error


def skeleton_of(model: nn.Module) -> bytes | None:
    """Return the float model without weights as a pickle that load accepts, or None."""
    file = io.BytesIO()
    try:
        bare = duplicate(model)
        bare.__dict__.pop("quantguard", None)  # stored in the manifest
        torch.save(with_empty_tensors(bare, to_meta=True), file)
        file.seek(0)
        read_pickle(file, "the skeleton")
    except Exception:
        return None
    return file.getvalue()
