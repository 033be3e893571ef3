"""Load a model of transformers (``hf:DIR``) from config.json and weights, never from the network.

transformers is imported when it is needed. ``trust_remote_code`` is never used, so that a folder
provides settings and weights, and no code.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import LoadError

_log = logging.getLogger("quantguard.model_loading")
_FAMILY = "transformers.models."
# These may name kernels that transformers downloads and runs; without them it uses its own.
_CODE = ("attn_implementation", "experts_implementation", "auto_map")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
            "pytorch_model.bin.index.json")


def build_hf(folder: str) -> nn.Module:
    """Build the untrained model of DIR/config.json.

    Raises:
        LoadError: the folder or its config.json does not exist, transformers does not have the
            model, or is not installed.
    """
    settings = _settings(folder)
    return from_settings(_class_of(settings, folder), settings, f"hf:{folder}")


def load_hf(folder: str) -> nn.Module:
    """Return the model of a folder with its weights, in float32 on the CPU.

    The weights are ``model.safetensors`` or ``pytorch_model.bin``, or shards of one with an index.

    Raises:
        LoadError: as in :func:`build_hf`; or the weights are missing, damaged or incomplete.
    """
    settings = _settings(folder)
    name = _class_of(settings, folder)
    found = [file for file in _WEIGHTS if (Path(folder) / file).is_file()]
    if not found:
        raise LoadError(f"hf:{folder}: the folder holds no weights",
                        why=f"None of these is there: {', '.join(_WEIGHTS)}.",
                        fix="Write them with model.save_pretrained(DIR).")
    cls = _model_class(name, f"hf:{folder}")
    try:
        with _quiet():
            model, info = cls.from_pretrained(
                folder, config=cls.config_class.from_dict(_harmless(settings, f"hf:{folder}")),
                local_files_only=True, trust_remote_code=False, output_loading_info=True,
                dtype=torch.float32, weights_only=True)
    except LoadError:
        raise
    except Exception as error:  # the file is damaged, or shapes do not fit
        raise LoadError(f"hf:{folder}: {found[0]} cannot be loaded into a {name}",
                        why=f"{type(error).__name__}: {str(error).strip()[:500]}") from error
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise LoadError(f"hf:{folder}: {found[0]} does not cover the {name} of config.json",
                        why=f"{len(missing)} missing or of another shape: {shown}",
                        fix="Use the folder of a model that was trained as a classifier.")
    unused = sorted(info["unexpected_keys"])
    _log.info("%s: weights from %s%s", folder, found[0],
              f"; {len(unused)} that a {name} does not have are ignored, such as {unused[0]}"
              if unused else "")
    loaded: nn.Module = model.eval()
    return loaded


def settings_of(model: nn.Module) -> dict[str, Any] | None:
    """Return the configuration of a model of transformers as JSON types; None for other models."""
    config: Any = getattr(model, "config", None)
    if not type(model).__module__.startswith(_FAMILY) or not hasattr(config, "to_dict"):
        return None
    settings = json.loads(json.dumps(config.to_dict(), default=str))
    return settings if isinstance(settings, dict) else None


def from_settings(name: str, settings: dict[str, Any], where: str) -> nn.Module:
    """Build an untrained model of transformers from the name of its class and its configuration.

    Raises:
        LoadError: the class is none of transformers, the configuration does not fit it, or
            transformers is not installed.
    """
    cls = _model_class(name, where)
    try:
        with _quiet():
            config = cls.config_class.from_dict(_harmless(settings, where))
            config.dtype = None
            built: nn.Module = cls(config).eval()
            return built
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"{where}: a {name} cannot be built from its configuration",
                        why=f"{type(error).__name__}: {str(error).strip()[:500]}") from error


def _settings(folder: str) -> dict[str, Any]:
    path = Path(folder)
    if not path.is_dir():
        raise LoadError(f"hf:{folder}: there is no such folder",
                        why="Nothing is downloaded.",
                        fix=f"Download it first: hf download {folder} --local-dir DIR"
                        if folder.count("/") <= 1 and not folder.startswith((".", "/")) else
                        "Name the folder that model.save_pretrained(DIR) wrote.")
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadError(f"hf:{folder}: the folder holds no config.json",
                        fix="Name the folder that model.save_pretrained(DIR) wrote.") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"{path / 'config.json'} cannot be read",
                        why=f"{type(error).__name__}: {error}") from error
    if not isinstance(settings, dict):
        raise LoadError(f"{path / 'config.json'} holds a {type(settings).__name__}, not settings")
    return settings


def _class_of(settings: dict[str, Any], folder: str) -> str:
    """Return the name of the model class of a config.json."""
    names = settings.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    kind = settings.get("model_type")
    _transformers(f"hf:{folder}")
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    name = auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(kind)
    if not isinstance(name, str):
        raise LoadError(f"hf:{folder}: config.json names no architecture",
                        why=f"Its model_type is {kind!r}.",
                        fix='Add "architectures": ["CLASS"], such as ViTForImageClassification.')
    return name


def _model_class(name: str, where: str) -> Any:
    transformers = _transformers(where)
    short = name.rpartition(".")[2]
    cls = getattr(transformers, short, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel) \
            or not cls.__module__.startswith(_FAMILY):
        raise LoadError(f"{where}: transformers {transformers.__version__} has no model {short!r}",
                        why="Code in a folder (auto_map) is never run.",
                        fix="Write a factory: --arch file.py:factory.")
    return cls


def _transformers(where: str) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise LoadError(f"{where} is a model of transformers, which cannot be imported",
                        why=f"{type(error).__name__}: {error}",
                        fix="Install it: pip install transformers.") from error


def _harmless(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Return settings without entries that name code or weights to download."""
    harmless: dict[str, Any] = {}
    for key, value in settings.items():
        if key.removeprefix("_").removesuffix("_internal") in _CODE:
            continue
        if key == "backbone" and isinstance(value, str) and "/" in value:
            raise LoadError(f"{where}: its backbone {value!r} would have to be downloaded")
        harmless[key] = False if key == "use_pretrained_backbone" else \
            _harmless(value, where) if isinstance(value, dict) else value
    return harmless


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off the progress bars and log messages of transformers; its errors become ours."""
    library: Any = importlib.import_module("transformers.utils.logging")
    bars, level = library.is_progress_bar_enabled(), library.get_verbosity()
    library.disable_progress_bar()
    library.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()
