"""PixelModel: logits in any output of a model, counts and normalisation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantguard.attacks import PixelModel, logits_of
from quantguard.core.errors import ConversionError
from quantguard.core.specs import Threat

Untouched = Callable[[nn.Module], AbstractContextManager[None]]



@dataclass
class Answer:
    """Output class of a model."""

    pred: Tensor | None
    aux: Tensor | None = None


class Output(dict[str, Tensor]):
    """Output as of Hugging Face models."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


@pytest.mark.parametrize("wrap", [
    lambda z: z, lambda z: (z, None), lambda z: [z], lambda z: {"logits": z, "loss": 0},
    lambda z: Output(logits=z), lambda z: {"pred": z}, lambda z: {"pred": z, "loss": None},
    lambda z: (None, z), lambda z: Answer(z), lambda z: Answer(None, z), lambda z: ({"pred": z},),
    lambda z: {"logits": (z, z + 1)}])
def test_logits_are_found_in_outputs_of_many_types(wrap: Callable[[Tensor], Any]) -> None:
    z = torch.randn(3, 4)
    assert logits_of(wrap(z)) is z


@pytest.mark.parametrize(("output", "description"), [
    (torch.zeros(3), r"\(3,\)"), (torch.zeros(3, 4, 2, 2), r"\(3, 4, 2, 2\)"),
    ({}, "a dict of nothing"), ((), "a tuple of nothing"), ("text", "str"), (None, "None"),
    (({"logits": 1},), "a tuple of a dict of 'logits': int"),
    ({"out": torch.zeros(3, 4), "h": torch.zeros(3, 9)},
     r"a dict of 'out': \(3, 4\), 'h': \(3, 9\)"),
    ((None, torch.zeros(3, 4), torch.zeros(3, 9)), r"a tuple of None, \(3, 4\), \(3, 9\)")])
def test_errors_describe_outputs_without_logits(output: Any, description: str) -> None:
    with pytest.raises(ConversionError, match=f"returns {description} where logits"):
        logits_of(output)


def test_images_are_counted_and_normalised() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return x.flatten(1)

    threat = Threat(mean=(0.5, 0.25, 0.0), std=(0.5, 2.0, 1.0))
    model = PixelModel(Spy(), threat)
    x = torch.rand(4, 3, 2, 2)
    model(x)
    model(x.clone().requires_grad_())
    assert (model.queries, model.gradients) == (8, 4)
    mean, std = torch.tensor(threat.mean).view(3, 1, 1), torch.tensor(threat.std).view(3, 1, 1)
    assert torch.allclose(seen[0], (x - mean) / std)
