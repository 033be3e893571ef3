"""Save models to .qg files and load them, without running code from the file.

A .qg file is a zip. ``manifest.json`` lists the sites and their quantizers, and
``weights.safetensors`` holds every tensor. The float model is rebuilt from an arch spec
(``torchvision:`` or ``timm:``), from the configuration of a transformers model, or from
``skeleton.pt``, a pickle of the model without its weights that only allow-listed classes may appear
in. Loading then converts the float model again.
"""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from ..core.errors import LoadError
from ..core.file_io import replacing
from ..core.metadata import ModelMetadata, annotate, metadata_from, metadata_of
from ..core.model_loading.architectures import build_fitting
from ..core.model_loading.load_model import is_our_file, load_model
from ..core.model_loading.model_spec import missing
from ..core.model_loading.transformers_models import settings_of
from ..core.module_utils import check_model, check_numbers, of_other_tensors, unwrap
from ..core.runtime import entry_point
from ..nn.quant_activation import quantizers
from .apply_plan import apply_plan
from .audit import Audit
from .checkpoint_architecture import SAFE_ARCHES, build_float_model, skeleton_of
from .checkpoint_manifest import read_plan, site_rows
from .checkpoint_weights import from_safetensors, materialized, to_safetensors, unique_tensors
from .converter import Conversion, conversion_of, restore

FORMAT = 1


@entry_point
def save(model: nn.Module, path: str | os.PathLike[str], *, arch: str | None = None) -> None:
    """Write a converted (or float) model to one file that :func:`load` reads.

    The file is written beside path and then renamed, so an existing file is never left damaged.

    Args:
        model: the model; wrappers such as DataParallel are taken off.
        path: the file to write.
        arch: the spec that builds the float model, if there is one.

    Raises:
        LoadError: quantized activations that ``convert`` did not add, state that is not a tensor,
            or tensors of a special class such as torchao's.
        ConversionError: not an nn.Module, or one on the meta device.
        WriteError: path cannot be written.
    """
    model = unwrap(model)
    check_model(model)
    check_numbers(model)
    other = of_other_tensors(model)
    if other is not None:
        raise LoadError(f"{other[0]} of the model is of class {other[1]}, "
                        "which a .qg file cannot hold",
                        fix="Save the float model, and quantize its weights after loading it.")
    done = conversion_of(model)
    if quantizers(model) and done is None:
        raise LoadError(f"{type(model).__name__} holds quantized activations "
                        "that convert did not add",
                        fix="Save its state_dict with torch.save, and build it in your own code.")
    tensors, aliases = unique_tensors(model)
    manifest: dict[str, Any] = {
        "format": FORMAT, "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "arch": arch, "config": settings_of(model), "training": model.training, "aliases": aliases,
        "sites": site_rows(done.plan) if done else None,
        "unread": dict(done.plan.unread) if done else {},
        "input": asdict(done.plan.input) if done and done.plan.input else None,
        "audit": asdict(done.audit) if done and done.audit else None,
        "metadata": metadata_of(model).metadata()}
    files = {"weights.safetensors": to_safetensors(tensors)}
    if arch is None or not arch.startswith(SAFE_ARCHES):
        skeleton = skeleton_of(model if done is None else restore(model))
        if skeleton is not None:
            files["skeleton.pt"] = skeleton
    with replacing(path) as beside, zipfile.ZipFile(beside, "w") as file:
        file.writestr("manifest.json", json.dumps(manifest, indent=1))
        for name, content in files.items():
            file.writestr(name, content)


@entry_point
def load(path: str | os.PathLike[str], *, model: nn.Module | None = None,
         trust: bool = False) -> nn.Module:
    """Read a model that :func:`save` or the command line wrote.

    No code in the file is run, and no module that the file names is imported. Classes come from
    torch, torchvision, timm, transformers and quantguard, or from modules that are imported
    already, if the class can be created without arguments.

    Args:
        path: the file.
        model: the float model, if the file cannot rebuild its class; it is copied.
        trust: import the class, or call the factory, that the file names.

    Raises:
        LoadError: not a .qg file, a damaged one, or one that needs ``model=``.
    """
    return _load(path, model, trust)


def _load(path: str | os.PathLike[str], model: nn.Module | None, trust: bool,
          arch: str | None = None) -> nn.Module:
    """Read a model; arch, if given, replaces the architecture that the file names."""
    where = os.fspath(path)
    if not Path(path).exists():
        raise missing(where)
    if not Path(path).is_file() or not is_our_file(path):
        raise LoadError(f"{where} is not a .qg file",
                        fix="quantguard convert makes one from a torch file.")
    try:
        with zipfile.ZipFile(path) as file:
            manifest = json.loads(file.read("manifest.json"))
            weights = file.read("weights.safetensors")
            skeleton = file.read("skeleton.pt") if "skeleton.pt" in file.namelist() else None
        if manifest["format"] != FORMAT:
            raise LoadError(f"{where} has format {manifest['format']}, this version reads {FORMAT}")
        state = from_safetensors(weights)
        state |= {alias: state[name] for alias, name in manifest["aliases"].items()}
        if arch is not None:
            float_model = build_fitting(arch, lambda _: state)
        else:
            float_model = build_float_model(manifest, skeleton, model, where, state, trust)
        plan = read_plan(manifest, float_model, where)
        row = manifest["audit"]
        audit = None if row is None else Audit(tuple(row["ran"]), tuple(row["left"]),
                                               bool(row["identical"]), row["seconds"])
        training = bool(manifest["training"])
        known = metadata_from(manifest.get("metadata"))  # missing in files of the first versions
    except LoadError:
        raise
    except Exception as error:  # a damaged manifest may raise any error
        raise LoadError(f"{where} is damaged", why=f"{type(error).__name__}: {error}") from error
    result = materialized(float_model) if plan is None else materialized(
        apply_plan(float_model, plan))
    try:
        result.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise LoadError(f"the tensors of {where} do not fit {manifest['class']}",
                        why=str(error).splitlines()[-1].strip(),
                        fix="Pass model= with the float model that was converted.") from error
    if model is not None or arch is not None or skeleton is None:
        result.train(training)
    if plan is not None:
        result.__dict__["quantguard"] = Conversion(plan, audit, **known)
    elif any(value is not None for value in known.values()):
        annotate(result, **known)
    return result


def open_model(spec: str, *, arch: str | None = None, trust: bool = False) -> nn.Module:
    """Return the model that MODEL names on the command line: a .qg file, a torch file or an arch.

    Raises:
        LoadError: none of these, or a file that may not be read without ``trust``.
    """
    if Path(spec).is_file() and is_our_file(spec):
        return _load(spec, None, trust, arch)
    model = load_model(spec, arch=arch, trust=trust)
    if isinstance(model.__dict__.get("quantguard"), ModelMetadata):
        try:  # a pickle may set the attribute to anything
            annotate(model, **metadata_from(metadata_of(model).metadata()))
        except Exception as error:
            raise LoadError(f"{spec} is damaged: its model.quantguard is no metadata",
                            why=f"{type(error).__name__}: {error}") from error
    return model


def rebuilds(path: str | os.PathLike[str]) -> bool:
    """Return whether a .qg file can be read without the code that built its model."""
    with zipfile.ZipFile(path) as file:
        manifest = json.loads(file.read("manifest.json"))
        return (manifest["arch"] or "").startswith(SAFE_ARCHES) or bool(manifest["config"]) \
            or "skeleton.pt" in file.namelist()
