"""What stands before a stage of training: the copy that is converted, its statistics, its input."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .activation import staircases
from .attacks import logits_of
from .batches import unpack
from .certifying import begin_afresh, input_of
from .contexts import bypass
from .conversion import convert, restore, with_entrance
from .entrance import is_input
from .errors import DataError, SpecError
from .probing import reestimate
from .recipes import Recipe
from .running import as_eaten, duplicate, evaluating, run, seeded
from .spec import FLOAT_BITS, QuantSpec, Threat


def prepare(model: nn.Module, loader: Iterable[Any], bits: int | Mapping[str, int] | None,
            dynamic: bool | None, recipe: Recipe, threat: Threat, seed: int,
            anew: bool = False) -> nn.Module:
    """Return the copy that is trained: converted as asked, or as it is converted already.

    Weights that are drawn anew, and a staircase on the input, come before and after that. One that
    is there stays: a float model behind it is converted as any other.

    Args:
        anew: whether to convert again what is converted already.

    Raises:
        SpecError: bits or dynamic contradict the model's conversion, or weights that are to be
            drawn anew are frozen.
    """
    if recipe.init == "interval":
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        if frozen:
            raise SpecError(f"recipe {recipe.name} draws weights anew, and {len(frozen)} are frozen"
                            f" ({frozen[0]}, …): they would stay as they are drawn",
                            fix="Let them train (requires_grad_(True)), or init='keep' (--set "
                                "init=keep) keeps all weights.")
        model = duplicate(model)
        begin_afresh(model, first_inputs(loader, model), seed)
    found, entry = staircases(model), None
    if found and (anew or (bits != FLOAT_BITS and all(map(is_input, found)))):
        converted: Any = model
        entry, model = converted.quantguard.plan.input, restore(model)
    if recipe.input_bits and not any(map(is_input, found)):
        entry = input_of(threat, recipe.input_bits)
    result = _prepared(model, loader, bits, dynamic, recipe)
    return result if entry is None else with_entrance(result, entry)


def first_inputs(loader: Iterable[Any], model: nn.Module) -> Any:
    """Return the images of a loader's first batch, on the model's device.

    Raises:
        DataError: there is none.
    """
    with seeded(0):  # a loader that shuffles draws
        for batch in loader:
            return as_eaten(unpack(batch)[0], model)
    raise DataError("the loader is empty", fix="Give at least one batch.")


def _prepared(model: nn.Module, loader: Iterable[Any], bits: int | Mapping[str, int] | None,
              dynamic: bool | None, recipe: Recipe) -> nn.Module:
    done = {(m.spec.bits, m.spec.dynamic) for name, m in staircases(model).items()
            if not is_input(name)}
    if done:
        for name, asked, have in (("bits", bits, {b for b, _ in done}),
                                  ("dynamic", dynamic, {d for _, d in done})):
            if asked is not None and have != {asked}:
                raise SpecError(
                    f"{name}={asked} contradicts the model, which is converted with {name}="
                    f"{', '.join(map(str, sorted(have)))}",
                    fix=f"Leave {name} out, or quantguard.restore(model) first.")
        return duplicate(model)
    if bits == FLOAT_BITS:
        return duplicate(model)
    table = bits if isinstance(bits, Mapping) else {"*": 2 if bits is None else bits}
    specs = {site: QuantSpec(b, bool(dynamic)) for site, b in table.items()}
    wanted = recipe.range_factor or 1.0
    afresh = recipe.init == "interval"
    if afresh:
        model = duplicate(model)
        reestimate(model, loader)
    # Finer steps make a small net sturdier and may leave a deep one with nothing to start from.
    for factor in dict.fromkeys((wanted, (1 + wanted) / 2, 1.0)):
        converted = convert(model, {site: replace(spec, range_factor=factor)
                                    for site, spec in specs.items()}, data=loader)
        if afresh or factor == 1.0 or agreement(converted, loader) >= 0.5:
            break
    return converted


def agreement(model: nn.Module, loader: Iterable[Any]) -> float:
    """Return the share of a loader's first images on which model answers as under ``bypass``."""
    same = total = 0
    with torch.no_grad(), evaluating(model), seeded(0):
        for batch in itertools.islice(loader, 4):
            inputs = as_eaten(unpack(batch)[0], model)
            answers = logits_of(run(model, inputs)).argmax(1)
            with bypass(model):
                same += int((logits_of(run(model, inputs)).argmax(1) == answers).sum())
            total += len(answers)
    return same / max(total, 1)
