"""The globals that a pickle may name. Each is safe whatever arguments it is called with.

torch's weights-only reader calls any global on its list with any arguments (REDUCE), and a loaded
model may contain one as ``partial(f, "...")`` and call it in its forward. So a global is only safe
if no arguments make it do anything but compute. These are:

- nn.Module classes of the packages below. Their constructors, forwards and ``__setstate__`` build
  modules and tensors. They were read and searched for calls that open, load, download, import,
  compile or evaluate (torch 2.14, torchvision 0.29, timm 1.0.31): only those of torch.fx do, which
  turn names in the model into Python source. A class with a ``__new__`` or ``__setstate__`` from
  outside of torch.nn is refused. The packages exclude torch.ao, torch.fx, torch.jit, torch.package,
  torch.nn.utils (makes classes) and the rest of torch.nn.parallel (opens connections).
- plain functions of torch.nn.functional, torch._C._nn and timm's activations: tensors in, tensors
  out. Other functions of torchvision and timm are refused: ``resnet18(weights=...)`` downloads.
- Enums (a call is a look-up) except torchvision's weights; and configurations, which are
  dataclasses without own code for creation or restoring.
- functools.partial, which calls nothing by itself and can only contain globals of this list.

As a second line of defence, ``pickle_calls`` lets the opcodes of a pickle call only partial and
Enums of this list: modules and configurations are created empty (``cls.__new__(cls)``) and get
their state once.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import is_dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

_PACKAGES = ("torch.nn.modules", "torch.nn.parallel.data_parallel", "torchvision.models",
             "torchvision.ops", "torchvision.transforms", "timm.models", "timm.layers")
_CODE_WRITERS = ("torchvision.models.feature_extraction", "timm.models._features_fx")
_FUNCTIONS = ("torch.nn.functional", "torch._C._nn", "timm.layers.activations",
              "timm.layers.activations_me")
# The metadata of a hardened model: two dataclasses of plain values.
_OURS = ("quantguard.core.metadata.ModelMetadata", "quantguard.core.specs.Threat")


def allowed(path: str) -> Any:
    """Return the global of a dotted name if it is on the allow-list, else None."""
    module, _, name = path.rpartition(".")
    if path == "functools.partial":
        return functools.partial
    if path in _OURS:
        return getattr(importlib.import_module(module), name)
    if not _inside(module, _PACKAGES + _FUNCTIONS):
        return None
    try:
        value = vars(importlib.import_module(module)).get(name)
    except ImportError:
        return None
    # The module that defines a global decides, not the one that re-exports it.
    home = getattr(value, "__module__", None) or ""
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return value if home in _FUNCTIONS and not name.startswith("_") else None
    if not isinstance(value, type) or not _inside(home, _PACKAGES) or _inside(home, _CODE_WRITERS):
        return None
    if issubclass(value, nn.Module):
        writes_code = issubclass(value, (torch.fx.GraphModule, torch.jit.ScriptModule))
        # torch.compile replaces the __setstate__ of nn.Module by a wrapper.
        restores = value.__setstate__ is nn.Module.__setstate__ or \
            getattr(value.__setstate__, "__module__", "").startswith("torch.nn.modules.")
        return value if value.__new__ is object.__new__ and restores and not writes_code else None
    if issubclass(value, Enum):
        return None if hasattr(value, "get_state_dict") else value
    default = value.__new__ is object.__new__ and not hasattr(value, "__setstate__")
    return value if is_dataclass(value) and default else None


def _inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)
