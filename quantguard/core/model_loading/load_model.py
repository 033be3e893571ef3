"""Load a MODEL (a file or an arch spec) as nn.Module, without running code from the file."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import LoadError
from .architectures import build_arch, build_fitting, module_of
from .model_spec import ARCH_HELP, LIBRARIES, MODEL_HELP, is_arch_spec, missing, parted, split
from .safe_pickle import read_pickle
from .state_dicts import fill, fitted, holds_weights, is_averaged, is_state, select
from .transformers_models import load_hf
from .weights_only import read_blank, state_of

__all__ = ["MODEL_HELP", "build_arch", "is_arch_spec", "is_our_file", "load_model"]

_log = logging.getLogger("quantguard.model_loading")


def is_our_file(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is in quantguard's own format: a zip with a manifest.json."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "manifest.json" in archive.namelist()
    except (OSError, zipfile.BadZipFile, NotImplementedError):
        return False


def load_model(model: str, *, arch: str | None = None, trust: bool = False) -> nn.Module:
    """Load a model from a file, a folder of transformers or an arch spec: on the CPU, eval mode.

    The logger ``quantguard.model_loading`` reports which weights of a file are used and how their
    names are changed; it warns if there are other weights.

    Args:
        model: an arch spec (``hf:DIR`` includes its weights), or a file: a whole model or a state
            dict from ``torch.save``, or safetensors. In a checkpoint, averaged weights (EMA, SWA)
            are preferred to raw ones; ``FILE?weights=KEY`` chooses by key, and
            ``FILE?weights=raw`` chooses raw ones. A prefix of the model's names (``module.``,
            ``model.``, ``_orig_mod.``) is removed, and everything beside the weights is ignored.
        arch: arch spec of the model that gets the weights. With trust, its module also provides
            the classes that a script pickled from its ``__main__``.
        trust: allow the file's pickle to import and run anything.

    Raises:
        LoadError: the file cannot be read, cannot be read safely, or does not fit ``arch``.
    """
    if is_arch_spec(model):
        if arch is not None:
            raise LoadError(f"{model} is an arch spec already, and so is arch={arch!r}",
                            fix="Give a file and --arch, or an arch spec alone.")
        source, name = parted(split(model)[0])
        return (load_hf(name) if source == "hf" else build_arch(model)).eval()
    name, settings = split(model)
    wanted = settings.pop("weights", None)
    if settings:
        raise LoadError(f"{model}: a file has no setting {next(iter(settings))!r}",
                        fix="FILE?weights=KEY is the only one; settings of the model belong "
                            "into --arch.")
    path = Path(name)
    _check_file(path)
    content, unread = _content(path, arch, trust)
    content, key, others = select(content, wanted, str(path))
    whole = isinstance(content, nn.Module)
    if whole and (arch is None or trust):
        _log_choice(path, key, others, [], wanted)
        return _unwrap(content, path).eval()
    state = state_of(content) if whole or not is_state(content) else content
    if state is None:
        keys = ", ".join(map(repr, list(content)[:5])) if isinstance(content, Mapping) else ""
        raise LoadError(f"{path} holds a {type(content).__name__}"
                        + (f" with the keys {keys}" if keys else ""),
                        why="This is neither a model nor a state dict.")
    if arch is None:
        raise LoadError(f"{path} is a state dict: weights without the model they belong to",
                        fix=f"Name the model with --arch. {ARCH_HELP}")
    rest = None if wanted is None else wanted.removeprefix(key).lstrip(".") or None
    network = build_fitting(arch, lambda built: fitted(state, built, rest)[0])
    named, done = fitted(state, network, rest)
    fix = "Name the arch that it was saved from, or a factory: --arch file.py:factory."
    if parted(split(arch)[0])[0] not in LIBRARIES:
        fix = "Name the arch that it was saved from; settings of the model follow a ?: " \
              f"--arch '{split(arch)[0]}?key=value'."
    if arch.startswith("hf:"):
        fix = f"{arch} alone, without a file, opens the weights of its folder."
    if whole:
        fix = f"The file holds a whole {type(content).__name__}, which opens without --arch. {fix}"
    if others:
        fix = f"Other weights in the file: {', '.join(others)} ({path}?weights={others[0]}). {fix}"
    fill(network, named, f"{key} of {path}" if key else str(path), arch, fix)
    changes = [done] if done else []
    if unread:
        more = ", ..." if len(unread) > 3 else ""
        changes.append(f"not read: {', '.join(unread[:3])}{more}")
    _log_choice(path, key, others, changes, wanted)
    return network.eval()


def _content(path: Path, arch: str | None, trust: bool) -> tuple[object, list[str]]:
    """Return the content of a file, and the names of globals that were not read."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path), []
    with path.open("rb") as file:
        try:
            main = module_of(arch) if trust and arch is not None else None
            return read_pickle(file, str(path), trust=trust, main=main), []
        except LoadError as refused:
            if trust or arch is None:
                raise
            # The weights can be read without the rest, even those of a whole model.
            file.seek(0)
            try:
                content, unread = read_blank(file, str(path))
            except LoadError:
                raise refused from None
            if not holds_weights(content):
                raise
            return content, unread


def _log_choice(path: Path, key: str, others: list[str], changes: list[str], wanted: str | None,
                ) -> None:
    """Log which weights are used, unless they are all of the file and unchanged.

    It is a warning if the file has other weights and the user chose none.
    """
    facts = [f"weights from {key!r}" if key else "all weights", *changes]
    if is_averaged(key):
        facts[0] += ", averaged over training"
    if others:
        raw = "raw" if is_averaged(key) and not any(map(is_averaged, others)) else others[0]
        facts.append(f"others: {', '.join(others)} ({path}?weights={raw})")
    if key or changes:
        (_log.warning if others and wanted is None else _log.info)("%s: %s", path, "; ".join(facts))


def _check_file(path: Path) -> None:
    """Check what the first bytes and the names in a file show, before any reader opens it.

    Raises:
        LoadError: it is not a file of torch.save or safetensors.
    """
    if not path.exists():
        raise missing(str(path))
    if path.is_dir():
        raise LoadError(f"{path} is a directory", fix=f"It holds a model of transformers: hf:{path}"
                        if (path / "config.json").is_file() else "Name the file in it.")
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
                        fix=f"Which function or class of it builds the model? {path}:FACTORY"
                        if path.suffix == ".py" else f"A model is {MODEL_HELP}.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path} is not a readable safetensors file", why=str(error)) from error


def _unwrap(model: nn.Module, path: Path) -> nn.Module:
    """Return the model in DataParallel, DistributedDataParallel, AveragedModel, torch.compile."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel,
                              torch.optim.swa_utils.AveragedModel)):
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
