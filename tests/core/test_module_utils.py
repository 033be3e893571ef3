"""Copies of models that have results or objects in their attributes."""

from __future__ import annotations

import copy
import threading
import types
from typing import Any

import pytest
import torch
from public_calls import VERBS, Batches, evaluate, harden
from torch import Tensor, nn

import quantguard as qg
from quantguard.core.module_utils import duplicate

pytestmark = pytest.mark.filterwarnings("ignore")


class Storing(nn.Module):
    """A model that stores its last output in an attribute."""

    def __init__(self, net: nn.Module, where: str) -> None:
        super().__init__()
        self.net, self.where, self.stored = net, where, None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        self.stored = {"attribute": y, "list": [y], "object": types.SimpleNamespace(y=y),
                       "set": {y}, "dict": {"a": (y,)}}[self.where]
        return y


@pytest.mark.parametrize("where", ["attribute", "list", "object", "set", "dict"])
@pytest.mark.parametrize("converted", [False, True])
def test_stored_results_are_copied_without_their_graph(
        where: str, converted: bool, cnn: nn.Module, batches: Batches) -> None:
    model: Any = Storing(copy.deepcopy(cnn), where).eval()
    model = qg.convert(model, data=batches) if converted else model
    answers = model(batches[0][0])
    clone: Any = duplicate(model)
    found = clone.stored
    found = found.y if where == "object" else next(iter(found.values()))[0] if where == "dict" \
        else next(iter(found)) if where in ("list", "set") else found
    assert torch.equal(found, answers) and not found.requires_grad
    harden(model, batches)
    assert torch.equal(clone(batches[0][0]), answers)


def test_an_attribute_that_cannot_be_copied_is_named(cnn: nn.Module, batches: Batches) -> None:
    model = copy.deepcopy(cnn)
    model.lock = threading.Lock()  # type: ignore[assignment]
    for verb in ("inspect", "convert", "harden"):
        with pytest.raises(qg.ConversionError, match="cannot be copied(.|\n)*lock"):
            VERBS[verb](model, batches)
    evaluate(model, batches)  # copies nothing
