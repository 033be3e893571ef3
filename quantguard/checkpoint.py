"""Our own file: one zip of a manifest, safetensors, and a skeleton. Loading never runs its code.

``manifest.json`` says which sites got which staircase, ``weights.safetensors`` holds every
tensor, and the skeleton is an arch spec (``torchvision:`` or ``timm:``), a pickle of the float
model without its weights, read through the allow-list of pickles.py, or the configuration of a
model of transformers. The conversion is carried out
again on loading.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import shlex
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .activation import staircases
from .architectures import build_fitting
from .audit import Audit
from .conversion import Conversion, carry_out, conversion_of, restore
from .discovery import Intercepted
from .errors import LoadError
from .files import replacing
from .kinds import described, rebuilt
from .metadata import ModelMetadata, annotate, metadata_from, metadata_of
from .model_spec import missing
from .models import is_our_file, load_model
from .pickles import read_pickle, working_directory_importable
from .plan import Plan
from .running import (
    check_model,
    check_numbers,
    duplicate,
    entry_point,
    of_other_tensors,
    unwrap,
)
from .sites import find_sites
from .spec import InputSpec, QuantSpec
from .transformers_models import from_settings, settings_of

FORMAT = 1
# Factories that a manifest may name: others are code of somebody else's choosing.
_SAFE_ARCHES = ("torchvision:", "timm:")


@entry_point
def save(model: nn.Module, path: str | os.PathLike[str], *, arch: str | None = None) -> None:
    """Write a converted (or float) model to one file that :func:`load` reads.

    The file is written beside path and renamed, so that what was there is never half gone.

    Args:
        model: the model; wrappers such as DataParallel are taken off.
        path: where to.
        arch: the spec that builds the float model, where one does.

    Raises:
        LoadError: staircases that quantguard did not put there, or state that is no tensor, or
            one of a class of its own, as torchao's weights are.
        ConversionError: no nn.Module, or one on the meta device.
        WriteError: path cannot be written.
    """
    model = unwrap(model)
    check_model(model)
    check_numbers(model)
    other = of_other_tensors(model)
    if other is not None:
        raise LoadError(f"{other[0]} of the model is of class {other[1]}, which no .qg file holds",
                        fix="Save the float model, and quantize its weights after loading it.")
    done = conversion_of(model)
    if staircases(model) and done is None:
        raise LoadError(f"{type(model).__name__} holds staircases that convert did not place",
                        fix="Save its state_dict with torch.save, and build it in your own code.")
    tensors, aliases = _unique(model)
    manifest: dict[str, Any] = {
        "format": FORMAT, "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "arch": arch, "config": settings_of(model), "training": model.training, "aliases": aliases,
        "sites": _sites(done.plan) if done else None,
        "unread": dict(done.plan.unread) if done else {},
        "input": asdict(done.plan.input) if done and done.plan.input else None,
        "audit": asdict(done.audit) if done and done.audit else None,
        "metadata": metadata_of(model).metadata()}
    files = {"weights.safetensors": _safetensors(tensors)}
    if arch is None or not arch.startswith(_SAFE_ARCHES):
        skeleton = _skeleton(model if done is None else restore(model))
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

    No code in the file is run, and none is imported that the file chooses: classes come from torch,
    torchvision, timm, transformers and quantguard, or from a module that is imported already and
    whose class can be made without arguments.

    Args:
        path: the file.
        model: the float model, where the file cannot rebuild its class; it is copied.
        trust: import the class, or call the factory, that the file names.

    Raises:
        LoadError: not such a file, damaged, or of a class that only ``model=`` can give.
    """
    return _load(path, model, trust)


def _load(path: str | os.PathLike[str], model: nn.Module | None, trust: bool,
          arch: str | None = None) -> nn.Module:
    """Read a model; what arch builds takes the place of what the file names."""
    where = os.fspath(path)
    if not Path(path).exists():
        raise missing(where)
    if not Path(path).is_file() or not is_our_file(path):
        raise LoadError(f"{where} is not a file of quantguard",
                        fix="quantguard convert makes one from a torch file.")
    try:
        with zipfile.ZipFile(path) as file:
            manifest = json.loads(file.read("manifest.json"))
            weights = file.read("weights.safetensors")
            skeleton = file.read("skeleton.pt") if "skeleton.pt" in file.namelist() else None
        if manifest["format"] != FORMAT:
            raise LoadError(f"{where} has format {manifest['format']}, this version reads {FORMAT}")
        state = _read_safetensors(weights)
        state |= {alias: state[name] for alias, name in manifest["aliases"].items()}
        float_model = build_fitting(arch, lambda _: state) if arch is not None else _float_model(
            manifest, skeleton, model, where, state, trust)
        plan = _plan(manifest, float_model, where)
        told = manifest["audit"]
        audit = None if told is None else Audit(tuple(told["ran"]), tuple(told["left"]),
                                                bool(told["identical"]), told["seconds"])
        training = bool(manifest["training"])
        known = metadata_from(manifest.get("metadata"))  # the first versions knew of none
    except LoadError:
        raise
    except Exception as error:  # a damaged manifest may hold anything, and raise anything
        raise LoadError(f"{where} is damaged", why=f"{type(error).__name__}: {error}") from error
    result = _materialised(float_model) if plan is None else _materialised(
        carry_out(float_model, plan))
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
    """Return the model that MODEL names on the command line: our file, a torch file, or an arch.

    Raises:
        LoadError: none of these, or one that may not be read without ``trust``.
    """
    if Path(spec).is_file() and is_our_file(spec):
        return _load(spec, None, trust, arch)
    model = load_model(spec, arch=arch, trust=trust)
    if isinstance(model.__dict__.get("quantguard"), ModelMetadata):
        try:  # a pickle sets attributes without asking anybody
            annotate(model, **metadata_from(metadata_of(model).metadata()))
        except Exception as error:
            raise LoadError(f"{spec} is damaged: its model.quantguard is no metadata",
                            why=f"{type(error).__name__}: {error}") from error
    return model


def rebuilds(path: str | os.PathLike[str]) -> bool:
    """Return whether a file of ours can be read without the code that built its model."""
    with zipfile.ZipFile(path) as file:
        manifest = json.loads(file.read("manifest.json"))
        return (manifest["arch"] or "").startswith(_SAFE_ARCHES) or bool(manifest["config"]) \
            or "skeleton.pt" in file.namelist()


def _unique(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state dict without tensors that are there twice, and those by name."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise LoadError(f"{name!r} in the state of {type(model).__name__} is a "
                            f"{type(value).__name__}, not a tensor")
        if is_lazy(value):
            raise LoadError(f"{name!r} in the state of {type(model).__name__} has no shape yet: "
                            "its layer is lazy", fix="Run the model once on a batch.")
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, aliases


def _safetensors(tensors: dict[str, Tensor]) -> bytes:
    import safetensors.torch
    return safetensors.torch.save(tensors)


def _read_safetensors(content: bytes) -> dict[str, Tensor]:
    import safetensors.torch
    try:
        return safetensors.torch.load(content)
    except Exception as error:
        raise ValueError(f"weights.safetensors: {error}") from error


def _sites(plan: Plan) -> list[dict[str, Any]]:
    rows = []
    for s in plan.sites:
        row: dict[str, Any] = {"name": s.name, "kind": s.kind, "reason": s.reason,
                               "spec": asdict(s.spec) if s.spec else None}
        if s.intercepted:  # found by running the model, which loading does not
            row["call"] = {
                "owner": s.owner, "identity": list(s.identity), "form": s.form,
                "target": s.target, "where": s.where, "argument": s.argument,
                "inplace": s.inplace, "function": described(s.function),
                "parts": [list(part) for part in s.parts]}
        rows.append(row)
    return rows


def _known(rows: list[dict[str, Any]]) -> dict[str, list[Intercepted]]:
    """Return the calls that were found by running the model."""
    known: dict[str, list[Intercepted]] = {}
    for row in rows:
        if "call" in row:
            c = row["call"]
            key, place, number = c["identity"]
            known.setdefault(c["owner"], []).append(Intercepted(
                (key, place, number), row["kind"], c["form"], c["target"],
                rebuilt(c["function"]), c["where"], c["argument"], c["inplace"], row["reason"],
                tuple((k, p, n) for k, p, n in c["parts"])))
    return known


def _plan(manifest: dict[str, Any], model: nn.Module, where: str) -> Plan | None:
    """Return the plan of the manifest, carried over to the sites of model."""
    if manifest["sites"] is None:
        return None
    told = {row["name"]: row for row in manifest["sites"]}
    found = find_sites(model, known=_known(manifest["sites"]), unread=manifest["unread"])
    names = {site.name for site in found.sites}
    if names != set(told):
        different = sorted(names ^ set(told))
        raise LoadError(f"{where} was made from another model than this {type(model).__name__}",
                        why=f"Activation sites differ: {', '.join(different[:5])}.")
    entry = manifest.get("input")  # files of the first versions know of none
    return replace(found, input=None if entry is None else InputSpec(**entry), sites=tuple(
        replace(site, reason=told[site.name]["reason"],
                spec=QuantSpec(**told[site.name]["spec"]) if told[site.name]["spec"] else None)
        for site in found.sites))


def _float_model(manifest: dict[str, Any], skeleton: bytes | None, model: nn.Module | None,
                 where: str, state: dict[str, Tensor], trust: bool) -> nn.Module:
    if model is not None:
        return unwrap(model)
    arch, name = manifest["arch"], str(manifest["class"])
    if arch is not None and (trust or arch.startswith(_SAFE_ARCHES)):
        return build_fitting(arch, lambda _: state)
    if skeleton is not None:
        read = read_pickle(io.BytesIO(skeleton), where)
        if isinstance(read, nn.Module):
            return read
    if manifest.get("config"):  # files of the first versions have none
        return from_settings(name, manifest["config"], where)
    try:
        if arch is not None and "?" in arch:  # its arguments are of the file's choice
            raise LoadError(f"{arch} builds it.")
        return _named(name, trust)
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


def _named(name: str, trust: bool) -> nn.Module:
    """Make the model whose class a file names: imported already, or to be imported with trust.

    Raises:
        LoadError: it is not, is no module's class, or cannot be made without arguments; ``what``
            says so in one sentence.
    """
    home, _, short = name.rpartition(".")
    if trust:
        with working_directory_importable():
            try:
                importlib.import_module(home)
            except Exception as error:  # whatever code does while it is imported
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
    except Exception as error:  # whatever its constructor does without arguments
        raise LoadError(f"{name}() failed ({type(error).__name__}: {error}).") from error


def _owners(model: nn.Module) -> Iterator[tuple[Any, str, Tensor]]:
    """Yield every place that holds a persistent tensor."""
    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for place in places:
            for name, value in place.items():
                if value is not None and name not in module._non_persistent_buffers_set:
                    yield place, name, value


def _moved(model: nn.Module, to_meta: bool) -> nn.Module:
    """Replace persistent tensors by empty ones; tied ones stay tied."""
    new: dict[int, Tensor] = {}
    old = []  # keeps every id taken
    for place, name, value in list(_owners(model)):
        if id(value) not in new:
            old.append(value)
            device = "meta" if to_meta else "cpu"
            empty: Tensor = torch.empty_like(value.detach(), device=device)
            if isinstance(value, nn.Parameter):
                empty = nn.Parameter(empty, value.requires_grad)
            new[id(value)] = empty
        place[name] = new[id(value)]
    return model


def _materialised(model: nn.Module) -> nn.Module:
    if any(value.is_meta for _, _, value in _owners(model)):
        return _moved(model, to_meta=False)
    return duplicate(model)


def _skeleton(model: nn.Module) -> bytes | None:
    """Return the float model without weights as a pickle that load accepts, or None."""
    file = io.BytesIO()
    try:
        bare = duplicate(model)
        bare.__dict__.pop("quantguard", None)  # the manifest has it
        torch.save(_moved(bare, to_meta=True), file)
        file.seek(0)
        read_pickle(file, "the skeleton")
    except Exception:
        return None
    return file.getvalue()
