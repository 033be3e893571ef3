"""The model that a stage of training starts from: converted, with an input quantizer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..attacks import logits_of
from ..conversion.converter import convert, restore, with_input_quantizer
from ..core.errors import DataError, SpecError
from ..core.model_calls import run
from ..core.module_utils import duplicate, evaluating
from ..core.nested_tensors import as_model_input
from ..core.runtime import seeded
from ..core.specs import FLOAT_BITS, QuantSpec, Threat
from ..data.batches import unpack
from ..nn.contexts import bypass
from ..nn.input_quantizer import is_input
from ..nn.quant_activation import quantizers
from .batchnorm import reestimate
from .certified import begin_afresh, input_of
from .recipes import Recipe


def prepare(model: nn.Module, loader: Iterable[Any], bits: int | Mapping[str, int] | None,
            dynamic: bool | None, recipe: Recipe, threat: Threat, seed: int,
            convert_again: bool = False) -> nn.Module:
    """Return a copy of the model for training: converted as asked, unless it is converted already.

    The recipe may ask for new weights before the conversion, and for an input quantizer after it.
    An input quantizer that the model has stays, and the float model behind it is converted.

    Args:
        convert_again: whether to convert a model again that is converted already.

    Raises:
        SpecError: bits or dynamic contradict the model's conversion, or the recipe reinitialises
            the weights and some are frozen.
    """
    if recipe.init == "interval":
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        if frozen:
            raise SpecError(f"recipe {recipe.name} reinitialises weights, and {len(frozen)} are "
                            f"frozen ({frozen[0]}, …): they would never be trained",
                            fix="Let them train (requires_grad_(True)), or use init='keep' (--set "
                                "init=keep), which keeps all weights.")
        model = duplicate(model)
        begin_afresh(model, first_inputs(loader, model), seed)
    found, input_spec = quantizers(model), None
    if found and (convert_again or (bits != FLOAT_BITS and all(map(is_input, found)))):
        converted: Any = model
        input_spec, model = converted.quantguard.plan.input, restore(model)
    if recipe.input_bits and not any(map(is_input, found)):
        input_spec = input_of(threat, recipe.input_bits)
    result = _converted(model, loader, bits, dynamic, recipe)
    return result if input_spec is None else with_input_quantizer(result, input_spec)


def first_inputs(loader: Iterable[Any], model: nn.Module) -> Any:
    """Return the images of a loader's first batch, on the model's device.

    Raises:
        DataError: the loader is empty.
    """
    with seeded(0):  # a loader that shuffles uses random numbers
        for batch in loader:
            return as_model_input(unpack(batch)[0], model)
    raise DataError("the loader is empty", fix="Give at least one batch.")


def _converted(model: nn.Module, loader: Iterable[Any], bits: int | Mapping[str, int] | None,
               dynamic: bool | None, recipe: Recipe) -> nn.Module:
    """Return a copy of the model, converted unless it is converted already or bits is 32."""
    done = {(m.spec.bits, m.spec.dynamic) for name, m in quantizers(model).items()
            if not is_input(name)}
    if done:
        for name, wanted, have in (("bits", bits, {b for b, _ in done}),
                                  ("dynamic", dynamic, {d for _, d in done})):
            if wanted is not None and have != {wanted}:
                raise SpecError(
                    f"{name}={wanted} contradicts the model, which is converted with {name}="
                    f"{', '.join(map(str, sorted(have)))}",
                    fix=f"Leave {name} out, or quantguard.restore(model) first.")
        return duplicate(model)
    if bits == FLOAT_BITS:
        return duplicate(model)
    table = bits if isinstance(bits, Mapping) else {"*": 2 if bits is None else bits}
    specs = {site: QuantSpec(b, bool(dynamic)) for site, b in table.items()}
    range_factor = recipe.range_factor or 1.0
    reinitialised = recipe.init == "interval"
    if reinitialised:
        model = duplicate(model)
        reestimate(model, loader)
    # Smaller steps make a shallow net more robust, but may destroy the accuracy of a deep one.
    for factor in dict.fromkeys((range_factor, (1 + range_factor) / 2, 1.0)):
        converted = convert(model, {site: replace(spec, range_factor=factor)
                                    for site, spec in specs.items()}, data=loader)
        if reinitialised or factor == 1.0 or agreement(converted, loader) >= 0.5:
            break
    return converted


def agreement(model: nn.Module, loader: Iterable[Any]) -> float:
    """Return the share of a loader's first images with the same answer as under ``bypass``."""
    same = total = 0
    with torch.no_grad(), evaluating(model), seeded(0):
        for batch in itertools.islice(loader, 4):
            inputs = as_model_input(unpack(batch)[0], model)
            answers = logits_of(run(model, inputs)).argmax(1)
            with bypass(model):
                same += int((logits_of(run(model, inputs)).argmax(1) == answers).sum())
            total += len(answers)
    return same / max(total, 1)
