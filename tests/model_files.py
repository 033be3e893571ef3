"""Small models in files, hostile files, and the error of loading them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantguard.core.errors import LoadError
from quantguard.core.model_loading.load_model import load_model


class Calls:
    """An object whose pickle is a call of ``function(*arguments)``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * 36, 10)).eval()


def saved(content: object, path: Path, **options: Any) -> str:
    torch.save(content, path, **options)
    return str(path)


def error_of(*arguments: Any, **options: Any) -> str:
    with pytest.raises(LoadError) as caught:
        load_model(*arguments, **options)
    return str(caught.value)


def hostile(path: Path, code: bytes) -> str:
    """Write a torch.save archive whose pickle is ``code``."""
    torch.save(small().state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, code if name.endswith("/data.pkl") else record)
    return str(path)
