"""Errors of convert and restore say what is wrong and what to do."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rewritten_models import Calls, Repeats, X
from torch import Tensor, nn

from quantguard.conversion.converter import convert, restore
from quantguard.core.errors import ConversionError, DataError, SpecError


def errors() -> Iterator[tuple[Callable[[], Any], type[Exception], str]]:
    model = Repeats()
    yield lambda: convert(convert(model)), ConversionError, "converted already: 'act' is a Quant"
    yield lambda: restore(model), ConversionError, "Repeats is not converted"
    yield lambda: convert(nn.Linear(2, 2)), ConversionError, "no activations to convert"
    yield lambda: convert(model, 9), SpecError, "bits=9 is not possible"
    yield lambda: convert(model, 32), ConversionError, r"act \(32 bits\)"
    yield lambda: convert(model, exclude="acts"), SpecError, "Did you mean 'act'"
    yield lambda: convert(model, data=[]), DataError, "data is empty"
    yield lambda: convert(model, data=iter([X])), DataError, "data"
    yield lambda: convert(model, data=[X[:, :3]]), DataError, r"shape \(8, 3\)"
    yield lambda: convert(model, example=X[:, :3]), DataError, r"inputs of shape"
    yield lambda: convert(nn.Sequential(nn.ReLU(), nn.Flatten())), ConversionError, "data="
    yield lambda: convert("resnet18"), ConversionError, "expected an nn.Module"  # type: ignore


@pytest.mark.parametrize(("call", "kind", "says"), list(errors()))
def test_errors_name_the_problem_and_the_remedy(call: Callable[[], Any], kind: type[Exception],
                                        says: str) -> None:
    with pytest.raises(kind, match=says):
        call()


def test_a_script_module_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        script = torch.jit.trace(Repeats(), X)
    with pytest.raises(ConversionError, match="ScriptModule"):
        convert(script)


def test_a_forward_that_cannot_be_reproduced_is_an_error_not_a_wrong_model() -> None:
    calls = itertools.count()

    def unsteady(module: nn.Module, x: Tensor) -> Tensor:
        return F.relu(x) + next(calls)

    with pytest.raises(ConversionError, match="does not reproduce"):
        convert(Calls(unsteady))
