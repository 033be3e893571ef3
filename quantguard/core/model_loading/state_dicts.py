"""Find the weights in a checkpoint, rename them to a model's names, and load them into it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import LoadError
from .weights_only import state_of

# Keys of raw weights, in order of preference.
_RAW = ("state_dict", "model_state_dict", "model", "net", "module", "network", "model_state",
        "net_state_dict", "weights", "model_weights", "params")
# Words in keys of weights that are averaged over training. These are preferred to raw ones.
_AVERAGED = {"ema", "swa", "avg", "average", "averaged", "polyak"}
# Name components that torch.compile, FSDP and activation checkpoints insert.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Tensors of AveragedModel and of FLOP counters that are no weights.
_COUNTERS = {"n_averaged", "total_ops", "total_params"}


def select(content: object, wanted: str | None, where: str) -> tuple[Any, str, list[str]]:
    """Find the weights, or the whole model, in the content of a file.

    Averaged weights (``model_ema``, ``state_dict_ema``, ``swa_...``) are preferred to raw ones, and
    the usual keys of raw weights (``state_dict``, ``model``) to other keys.

    Args:
        content: the content of the file.
        wanted: a key (with dots for nested dicts), ``raw`` for raw weights even if there are
            averaged ones, or a prefix of the weights' names; None: choose as above.
        where: the file, for errors.

    Returns:
        A state dict or a module; its key, with dots, or ``""`` if it is the whole file; and the
        keys of the other weights.

    Raises:
        LoadError: there are no weights, several sets without a preference, or no such key.
    """
    keys: list[str] = []
    others: list[str] = []
    path = [] if wanted in (None, "raw") else str(wanted).split(".")
    while isinstance(content, Mapping) and state_of(content) is None:
        candidates = {str(k): v for k, v in content.items() if holds_weights(v)}
        if path and path[0] in candidates:
            key = path.pop(0)
        elif not candidates or (is_state(content) and not _known(candidates)):
            break
        else:
            key = _chosen(candidates, wanted == "raw", where, is_state(content))
            if not key:
                break
        others += [".".join([*keys, k]) for k in candidates if k != key]
        keys.append(key)
        content = candidates[key]
    names = list(content) if isinstance(content, Mapping) and is_state(content) else []
    if path and not any(k.startswith(path[0]) for k in names):
        known = [*([".".join(keys)] if keys else []), *others]
        raise LoadError(f"{where} holds no weights under {wanted!r}",
                        why=f"There are: {', '.join(known) or 'weights without a key'}.",
                        fix="Choose one of them with FILE?weights=KEY, or leave ?weights= out.")
    return content, ".".join(keys), others


def is_state(content: object) -> bool:
    """Return whether content is a state dict: only text as keys, and tensors among the values."""
    return isinstance(content, Mapping) and all(isinstance(k, str) for k in content) \
        and any(isinstance(v, Tensor) for v in content.values())


def is_averaged(key: str) -> bool:
    """Return whether the key of weights says that they are averaged over training."""
    return bool(_AVERAGED & set(re.split(r"[\W_]+", key.lower())))


def fitted(state: Mapping[str, Any], model: nn.Module, wanted: str | None = None,
           ) -> tuple[dict[str, Any], str]:
    """Rename weights to the names that they have in a model.

    The components of wrappers are removed, then any common prefix (``module.``, ``model.``,
    ``net.``, ``backbone.``). If the model's names have a prefix that the weights lack, it is added.

    Args:
        state: the weights.
        model: the model that they are for.
        wanted: the prefix to choose if several would fit; or ``raw``.

    Returns:
        The weights by their new names, including weights that do not fit; and a description of
        the changes, which is empty if there were none.

    Raises:
        LoadError: several prefixes fit.
    """
    own = list(model.state_dict())
    needed = {k for k in own if _is_needed(k)}
    state, wrappers = _unwrapped(state, any("module" in k.split(".") for k in own))
    done = [f"{', '.join(map(repr, wrappers))} removed from their names"] if wrappers else []
    found: Counter[str] = Counter()
    for key in state:
        words = key.split(".")
        for i in range(len(words)):
            if ".".join(words[i:]) in needed:
                found["".join(f"{word}." for word in words[:i])] += 1
    full = [p for p, n in found.items() if n == len(needed)]
    prefix = _prefix(found, full, wanted)
    common = _common_prefix(own)
    added = not found and bool(common) and needed <= {common + k for k in state}
    if added:
        prefix, state = common, {common + k: v for k, v in state.items()}
        done.append(f"{prefix!r} added before their names")
    elif prefix:
        done.append(f"{prefix!r} removed from their names")
    # Weights of another whole model in the file, and counters, are not of this model.
    ignored = {k for k in state if k not in own and (
        k in _COUNTERS or k.rpartition(".")[2] in _COUNTERS
        or any(k.startswith(p) for p in full if p not in ("", prefix)))}
    if prefix and not added:
        ignored |= {k for k in state if not k.startswith(prefix)}
        named = {k.removeprefix(prefix): v for k, v in state.items() if k not in ignored}
    else:
        named = {k: v for k, v in state.items() if k not in ignored}
    logged = [k for k in state if k in ignored and k.rpartition(".")[2] not in _COUNTERS]
    if logged:
        done.append(f"left out: {', '.join(logged[:3])}" + (", ..." if len(logged) > 3 else ""))
    return named, "; ".join(done)


def fill(model: nn.Module, state: Mapping[str, Any], where: str, arch: str, fix: str) -> None:
    """Load weights into a model, after a check that all names and shapes match.

    Raises:
        LoadError: they do not match; the message lists the differences.
    """
    own = model.state_dict()
    tensors = {k: v for k, v in state.items()
               if isinstance(v, Tensor) or not isinstance(own.get(k), Tensor)}
    both = [(k, v, own.get(k)) for k, v in tensors.items()]
    shapes = [(k, tuple(v.shape), tuple(o.shape)) for k, v, o in both
              if isinstance(v, Tensor) and isinstance(o, Tensor) and v.shape != o.shape]
    missing = [k for k in own if k not in tensors and _is_needed(k)]
    unexpected = [k for k in tensors if k not in own]
    problems = [f"{k} is {saved} in the file and {built} in the model"
                + (": number of classes?" if saved[1:] == built[1:] else "")
                for k, saved, built in shapes[:3]]
    problems += [f"{len(keys)} {what}: {', '.join(keys[:3])}" + (", ..." if len(keys) > 3 else "")
                 for keys, what in ((missing, "missing from the file"),
                                    (unexpected, "not in the model")) if keys]
    if len(shapes) > 3:
        problems.append(f"{len(shapes) - 3} more shapes differ")
    if problems:
        raise LoadError(f"{where} does not fit {arch}", why="\n".join(problems), fix=fix)
    # Some modules (MNASNet) need the version in the metadata, which plain dicts do not have.
    filled = type(own)(tensors)
    filled._metadata = own._metadata  # type: ignore[attr-defined]
    try:
        model.load_state_dict(filled, strict=False)
    except Exception as error:
        raise LoadError(f"{where} does not fit {arch}", why=str(error)) from error


def _known(keys: Collection[str]) -> list[str]:
    """Return those of some keys that usually have weights, averaged ones first."""
    return [k for k in keys if is_averaged(k)] + [k for k in _RAW if k in keys]


def _chosen(candidates: Collection[str], raw: bool, where: str, state: bool) -> str:
    """Return the preferred key, or ``""`` if the dict with the keys is the state dict itself.

    Args:
        candidates: the keys of weights.
        raw: ignore averaged weights.
        where: the file, for errors.
        state: whether the dict with the keys may be a state dict.
    """
    keys = [k for k in candidates if not (raw and is_averaged(k))]
    known = _known(keys)
    if known or state or not keys:
        return known[0] if known else ""
    if len(keys) > 1:
        raise LoadError(f"{where} holds several sets of weights: {', '.join(keys)}",
                        fix=f"Name one: {where}?weights={keys[0]}")
    return keys[0]


def holds_weights(value: object, depth: int = 3) -> bool:
    """Return whether a value is a state dict or a module, or a dict that contains one."""
    if state_of(value) is not None or is_state(value):
        return True
    return depth > 0 and isinstance(value, Mapping) and any(
        isinstance(k, str) and holds_weights(v, depth - 1) for k, v in value.items())


def _is_needed(name: str) -> bool:
    """Return whether a file must have a weight; before torch 0.4 there was no such counter."""
    return not name.endswith("num_batches_tracked")


def _unwrapped(state: Mapping[str, Any], has_module: bool) -> tuple[dict[str, Any], list[str]]:
    """Remove the components of wrappers from names, and list them.

    Args:
        state: the weights.
        has_module: whether the model's own names have a component ``module``, so that this is not
            DataParallel's.
    """
    wrappers = _WRAPPERS | (set() if has_module else {"module"})
    named = {".".join(p for p in k.split(".") if p not in wrappers): v for k, v in state.items()}
    if len(named) < len(state):  # the file has two models, one of them in a wrapper
        return dict(state), []
    words = {word for k in state for word in k.split(".")}
    return named, [f"{w}." for w in sorted(wrappers & words)]


def _prefix(found: Counter[str], full: list[str], wanted: str | None) -> str:
    """Return the prefix to remove from names.

    Args:
        found: for each prefix, how many of the model's names are in the file with it.
        full: the prefixes with which all names are in the file.
        wanted: as in :func:`fitted`.
    """
    chosen = [p for p in found if (p.startswith(str(wanted)) if wanted not in (None, "raw")
                                   else wanted is None or not is_averaged(p))]
    whole = [p for p in chosen if p in full]
    averaged = [p for p in whole if is_averaged(p)]
    if len(averaged) == 1:
        return averaged[0]
    if "" in whole or not chosen:
        return ""
    if len(whole) > 1:
        raise LoadError(f"the file holds several sets of weights that fit: {', '.join(whole)}",
                        fix=f"Name one: FILE?weights={whole[0].rstrip('.')}")
    return min(whole or chosen, key=lambda p: (-found[p], len(p)))


def _common_prefix(own: list[str]) -> str:
    """Return the longest prefix, of whole components, that all of a model's names have."""
    first = own[0].split(".")[:-1] if own else []
    for i in range(len(first), 0, -1):
        prefix = ".".join(first[:i]) + "."
        if all(k.startswith(prefix) for k in own):
            return prefix
    return ""
