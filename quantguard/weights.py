"""Which weights of a checkpoint belong to a model: found, named, and fitted to its names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from .blank import state_of
from .errors import LoadError

# Where weights as trained stand, in the order in which they are looked for.
_TRAINED = ("state_dict", "model_state_dict", "model", "net", "module", "network", "model_state",
            "net_state_dict", "weights", "model_weights", "params")
# A part of a key that says: averaged over training. People evaluate these, so they come first.
_AVERAGED = {"ema", "swa", "avg", "average", "averaged", "polyak"}
# What wrappers (torch.compile, FSDP, activation checkpoints) put into the names of weights.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What AveragedModel, and counters of operations, leave among the weights.
_COUNTERS = {"n_averaged", "total_ops", "total_params"}


def select(content: object, wanted: str | None, where: str) -> tuple[Any, str, list[str]]:
    """Find the weights, or the whole model, in what a file holds.

    Averaged weights (``model_ema``, ``state_dict_ema``, ``swa_...``) go before those as trained;
    among these ``state_dict``, ``model`` and the like before other keys.

    Args:
        content: what the file holds.
        wanted: a key (of nested dicts, with dots), ``raw`` for weights as trained whatever
            averaged ones there are, or the beginning of the weights' names; None: by the rule.
        where: the file, for errors.

    Returns:
        A state dict or a module; the key that it stood under, with dots, ``""`` for the file
        itself; and the keys of other weights beside it.

    Raises:
        LoadError: no weights, several that nothing chooses between, or no such key.
    """
    keys: list[str] = []
    others: list[str] = []
    ways = [] if wanted in (None, "raw") else str(wanted).split(".")
    while isinstance(content, Mapping) and state_of(content) is None:
        there = {str(k): v for k, v in content.items() if holds_weights(v)}
        if ways and ways[0] in there:
            key = ways.pop(0)
        elif not there or (is_state(content) and not _known(there)):
            break
        else:
            key = _chosen(there, wanted == "raw", where, is_state(content))
            if not key:
                break
        others += [".".join([*keys, k]) for k in there if k != key]
        keys.append(key)
        content = there[key]
    names = list(content) if isinstance(content, Mapping) and is_state(content) else []
    if ways and not any(k.startswith(ways[0]) for k in names):
        known = [*([".".join(keys)] if keys else []), *others]
        raise LoadError(f"{where} holds no weights under {wanted!r}",
                        why=f"There are: {', '.join(known) or 'weights without a key'}.",
                        fix="Name one of them: FILE?weights=KEY, or none.")
    return content, ".".join(keys), others


def is_state(content: object) -> bool:
    """Return whether content is a state dict: text to tensors, and little else."""
    return isinstance(content, Mapping) and all(isinstance(k, str) for k in content) \
        and any(isinstance(v, Tensor) for v in content.values())


def is_averaged(key: str) -> bool:
    """Return whether a key says of weights that they are averaged over training."""
    return bool(_AVERAGED & set(re.split(r"[\W_]+", key.lower())))


def fitted(state: Mapping[str, Any], model: nn.Module, wanted: str | None = None,
           ) -> tuple[dict[str, Any], str]:
    """Rename weights to the names that they have in a model.

    Wrappers' parts of names go; then what stands before the model's own names (``module.``,
    ``model.``, ``net.``, ``backbone.``, whatever it is), or is missing there.

    Args:
        state: the weights.
        model: the model that they are for.
        wanted: how their names begin, where several parts of the file would fit; or ``raw``.

    Returns:
        The weights by their new names, those that did not fit among them, and what was done to the
        names in words, or nothing.

    Raises:
        LoadError: several parts of the file fit.
    """
    own = list(model.state_dict())
    needed = {k for k in own if _is_needed(k)}
    state, wrappers = _unwrapped(state, any("module" in k.split(".") for k in own))
    done = [f"{', '.join(map(repr, wrappers))} taken out of their names"] if wrappers else []
    found: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in needed:
                found["".join(f"{part}." for part in parts[:i])] += 1
    full = [p for p, n in found.items() if n == len(needed)]
    prefix = _prefix(found, full, wanted)
    lacks = _lacking(own)
    if not found and lacks and needed <= {lacks + k for k in state}:
        prefix, state = lacks, {lacks + k: v for k, v in state.items()}
        done.append(f"{prefix!r} put before their names")
    elif prefix:
        done.append(f"{prefix!r} taken off their names")
    # What another whole model in the file owns is none of this one's; nor are counters.
    left = {k for k in state if k not in own and (
        k in _COUNTERS or k.rpartition(".")[2] in _COUNTERS
        or any(k.startswith(p) for p in full if p not in ("", prefix)))}
    if prefix and not done[-1].endswith("before their names"):
        left |= {k for k in state if not k.startswith(prefix)}
        named = {k.removeprefix(prefix): v for k, v in state.items() if k not in left}
    else:
        named = {k: v for k, v in state.items() if k not in left}
    said = [k for k in state if k in left and k.rpartition(".")[2] not in _COUNTERS]
    if said:
        done.append(f"left out: {', '.join(said[:3])}" + (", ..." if len(said) > 3 else ""))
    return named, "; ".join(done)


def fill(model: nn.Module, state: Mapping[str, Any], where: str, arch: str, fix: str) -> None:
    """Load weights into a model: every name and shape, or one error that lists the rest.

    Raises:
        LoadError: they do not fit, or do not cover the model.
    """
    own = model.state_dict()
    tensors = {k: v for k, v in state.items()
               if isinstance(v, Tensor) or not isinstance(own.get(k), Tensor)}
    both = [(k, v, own.get(k)) for k, v in tensors.items()]
    shapes = [(k, tuple(v.shape), tuple(o.shape)) for k, v, o in both
              if isinstance(v, Tensor) and isinstance(o, Tensor) and v.shape != o.shape]
    missing = [k for k in own if k not in tensors and _is_needed(k)]
    unexpected = [k for k in tensors if k not in own]
    problems = [f"{k} is {there} in the file and {here} in the model"
                + (": number of classes?" if there[1:] == here[1:] else "")
                for k, there, here in shapes[:3]]
    problems += [f"{len(keys)} {what}: {', '.join(keys[:3])}" + (", ..." if len(keys) > 3 else "")
                 for keys, what in ((missing, "missing from the file"),
                                    (unexpected, "not in the model")) if keys]
    if len(shapes) > 3:
        problems.append(f"{len(shapes) - 3} more shapes differ")
    if problems:
        raise LoadError(f"{where} does not fit {arch}", why="\n".join(problems), fix=fix)
    # Some modules (MNASNet) need their version beside the weights; bare dicts have lost it.
    filled = type(own)(tensors)
    filled._metadata = own._metadata  # type: ignore[attr-defined]
    try:
        model.load_state_dict(filled, strict=False)
    except Exception as error:
        raise LoadError(f"{where} does not fit {arch}", why=str(error)) from error


def _known(there: Collection[str]) -> list[str]:
    """Return the keys that say of what they hold that it is weights, averaged ones first."""
    return [k for k in there if is_averaged(k)] + [k for k in _TRAINED if k in there]


def _chosen(there: Collection[str], raw: bool, where: str, state: bool) -> str:
    """Return the key to take, by the rule; nothing where the dict around them is the state."""
    there = [k for k in there if not (raw and is_averaged(k))]
    known = _known(there)
    if known or state or not there:
        return known[0] if known else ""
    if len(there) > 1:
        raise LoadError(f"{where} holds several sets of weights: {', '.join(there)}",
                        fix=f"Name one: {where}?weights={there[0]}")
    return there[0]


def holds_weights(value: object, depth: int = 3) -> bool:
    """Return whether a value is a state dict or a module, or a dict around one."""
    if state_of(value) is not None or is_state(value):
        return True
    return depth > 0 and isinstance(value, Mapping) and any(
        isinstance(k, str) and holds_weights(v, depth - 1) for k, v in value.items())


def _is_needed(name: str) -> bool:
    """Return whether a file must have a name; those from before torch 0.4 lack this counter."""
    return not name.endswith("num_batches_tracked")


def _unwrapped(state: Mapping[str, Any], has_module: bool) -> tuple[dict[str, Any], list[str]]:
    """Take wrappers' parts out of names, DataParallel's, too, where a model's own has none."""
    wrappers = _WRAPPERS | (set() if has_module else {"module"})
    named = {".".join(p for p in k.split(".") if p not in wrappers): v for k, v in state.items()}
    if len(named) < len(state):  # with and without a wrapper: two models
        return dict(state), []
    there = {part for k in state for part in k.split(".")}
    return named, [f"{w}." for w in sorted(wrappers & there)]


def _prefix(found: Counter[str], full: list[str], wanted: str | None) -> str:
    """Return what to take off names.

    Args:
        found: how many of the model's names are there with each prefix.
        full: the prefixes with which all are.
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


def _lacking(own: list[str]) -> str:
    """Return what all of a model's names begin with."""
    first = own[0].split(".")[:-1] if own else []
    for i in range(len(first), 0, -1):
        prefix = ".".join(first[:i]) + "."
        if all(k.startswith(prefix) for k in own):
            return prefix
    return ""
