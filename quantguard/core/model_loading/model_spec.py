"""Parse MODEL: a file or an arch spec, and its settings after a ``?``. Imports no torch."""

from __future__ import annotations

import ast
import importlib
import os
import re
from pathlib import Path
from typing import Any

from ..errors import LoadError

MODEL_HELP = ("a file, torchvision:NAME, timm:NAME, hf:DIR, package.module:factory or "
              "file.py:factory")
ARCH_HELP = "Use torchvision:NAME, timm:NAME, hf:DIR, package.module:factory or file.py:factory."
LIBRARIES = ("torchvision", "timm", "hf")

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_arch_spec(model: str) -> bool:
    """Return whether ``model`` names an architecture: ``LIBRARY:NAME`` or ``module:factory``.

    Existing files, paths with a drive letter and URLs are no arch specs, and neither is text that
    cannot be a Python name, such as ``run 12:30.pt``.
    """
    source, name = parted(split(model)[0])
    if os.path.exists(model) or not source or _URL.match(model):
        return False
    if source in LIBRARIES or source.endswith(".py"):
        return True
    if _DRIVE.match(model) or name.endswith((".pt", ".pth")):
        return False
    return all(not text or _DOTTED.fullmatch(text)
               for text in (source.replace("/", ".").lstrip("."), name))


def parted(spec: str) -> tuple[str, str]:
    """Return source and name of an arch spec, before and after its colon.

    Without a colon, the source is empty. After a Python file the last colon counts, because the
    path may have a drive letter.
    """
    file, colon, name = spec.rpartition(":")
    if colon and file.endswith(".py"):
        return file, name
    source, colon, name = spec.rpartition(":") if _DRIVE.match(spec) else spec.partition(":")
    return (source, name) if colon else ("", spec)


def split(spec: str) -> tuple[str, dict[str, Any]]:
    """Return a MODEL or arch spec without its settings, and the settings.

    They follow a question mark: ``NAME?key=value&key=value``. Numbers, true, false and none are
    converted to Python values; other values stay text. The name of an existing file is not split.

    Raises:
        LoadError: a setting is not KEY=VALUE.
    """
    name, mark, text = spec.partition("?")
    if not mark or os.path.exists(spec):
        return spec, {}
    settings: dict[str, Any] = {}
    for setting in text.split("&"):
        key, equals, value = setting.partition("=")
        if not equals or not key.isidentifier() or not value:
            raise LoadError(f"{spec!r}: {setting!r} after the ? is not KEY=VALUE",
                            fix="Write torchvision:resnet18?num_classes=3, or FILE?weights=KEY.")
        settings[key] = _value(value)
    return name, settings


def file_of(model: str) -> str | None:
    """Return the path of MODEL without its settings; None if it is an arch spec."""
    return None if is_arch_spec(model) else split(model)[0]


def default_name(model: str) -> str:
    """Return the default path of an output, without suffix: beside a file, else in this folder."""
    file = file_of(model)
    if file is not None:
        return str(Path(file).with_suffix(""))
    source, name = parted(split(model)[0])
    return (Path(name).name or "model") if source == "hf" else name.replace(":", "-")


def missing(path: str) -> LoadError:
    """Return the error for a file that does not exist."""
    fix = f"A model is {MODEL_HELP}."
    if _URL.match(path):
        fix = "Nothing is downloaded: download the file, and name it."
    elif re.fullmatch(r"[\w.-]+", path) and "." not in path.rpartition("-")[2]:
        fix = suggestion(path) or fix
    return LoadError(f"{path} does not exist", fix=fix)


def suggestion(name: str) -> str:
    """Return a question with the library of a model name, or nothing if no library has it.

    This imports the libraries that are installed.
    """
    for library in ("torchvision", "timm"):
        known = known_names(library)
        if name.partition(".")[0].lower() in known:
            return f"Did you mean {library}:{name.lower()}?"
    return ""


def known_names(library: str) -> list[str]:
    """Return the model names of torchvision or timm; an empty list if it is not installed."""
    try:
        listed = importlib.import_module(
            "torchvision.models" if library == "torchvision" else library)
    except ImportError:
        return []
    return list(listed.list_models())


def _value(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
