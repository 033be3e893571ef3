"""MODEL as text: a file or an arch spec, and the settings behind its ``?``. Imports no torch."""

from __future__ import annotations

import ast
import importlib
import os
import re
from pathlib import Path
from typing import Any

from .errors import LoadError

MODEL_HELP = ("a file, torchvision:NAME, timm:NAME, hf:DIR, package.module:factory or "
              "file.py:factory")
ARCH_HELP = "Use torchvision:NAME, timm:NAME, hf:DIR, package.module:factory or file.py:factory."
LIBRARIES = ("torchvision", "timm", "hf")

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_arch_spec(model: str) -> bool:
    """Return whether ``model`` names an architecture: ``LIBRARY:NAME`` or ``module:factory``.

    What is a file on this machine, a path with a drive letter and an address are none, and neither
    is what no Python name could be, such as ``run 12:30.pt``.
    """
    room, name = parted(split(model)[0])
    if os.path.exists(model) or not room or _ADDRESS.match(model):
        return False
    if room in LIBRARIES or room.endswith(".py"):
        return True
    if _DRIVE.match(model) or name.endswith((".pt", ".pth")):
        return False
    return all(not part or _DOTTED.fullmatch(part)
               for part in (room.replace("/", ".").lstrip("."), name))


def parted(spec: str) -> tuple[str, str]:
    """Return what stands before and after the colon of an arch spec; no colon: nothing, and spec.

    Of a file with Python code it is the last colon: its drive may have another.
    """
    file, colon, name = spec.rpartition(":")
    if colon and file.endswith(".py"):
        return file, name
    room, colon, name = spec.rpartition(":") if _DRIVE.match(spec) else spec.partition(":")
    return (room, name) if colon else ("", spec)


def split(spec: str) -> tuple[str, dict[str, Any]]:
    """Return a MODEL or arch spec without its settings, and these: ``NAME?key=value&key=value``.

    Numbers, true, false and none become Python's; everything else stays text. The name of a file
    that is there is never cut.

    Raises:
        LoadError: a setting that is not KEY=VALUE.
    """
    name, mark, text = spec.partition("?")
    if not mark or os.path.exists(spec):
        return spec, {}
    settings: dict[str, Any] = {}
    for part in text.split("&"):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier() or not value:
            raise LoadError(f"{spec!r}: {part!r} behind the ? is not KEY=VALUE",
                            fix="Write torchvision:resnet18?num_classes=3, or FILE?weights=KEY.")
        settings[key] = _value(value)
    return name, settings


def file_of(model: str) -> str | None:
    """Return the path of the file that MODEL names, without its settings; None: an arch spec."""
    return None if is_arch_spec(model) else split(model)[0]


def default_name(model: str) -> str:
    """Return the path, without its suffix, of what is made of MODEL: beside a file, else here."""
    file = file_of(model)
    if file is not None:
        return str(Path(file).with_suffix(""))
    room, name = parted(split(model)[0])
    return (Path(name).name or "model") if room == "hf" else name.replace(":", "-")


def missing(path: str) -> LoadError:
    """Return the error for a file that is not there."""
    fix = f"A model is {MODEL_HELP}."
    if _ADDRESS.match(path):
        fix = "Nothing is downloaded: fetch the file, and name it."
    elif re.fullmatch(r"[\w.-]+", path) and "." not in path.rpartition("-")[2]:
        fix = suggestion(path) or fix
    return LoadError(f"{path} does not exist", fix=fix)


def suggestion(name: str) -> str:
    """Return which architecture of a library somebody means who gives its bare name, or nothing.

    Only libraries that are installed are asked; this imports them.
    """
    for library in ("torchvision", "timm"):
        known = known_names(library)
        if name.partition(".")[0].lower() in known:
            return f"Did you mean {library}:{name.lower()}?"
    return ""


def known_names(library: str) -> list[str]:
    """Return the models that torchvision or timm lists, none where it is not installed."""
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
