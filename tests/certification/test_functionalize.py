"""In-place writes to what quantizers return are followed to their readers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from averaging_model import D, X, Y
from torch import Tensor, nn

import quantguard as qg
from quantguard.certification.graph.graph import model_graph
from quantguard.core.errors import ConversionError


class Written(nn.Module):
    """Write into the output of a quantizer; then read its input again, or not."""

    def __init__(self, again: bool, spelled: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 2)
        self.levels = qg.QuantActivation.from_thresholds([0.2, 0.4, 0.6], 0.2)
        self.again, self.spelled = again, spelled

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        z = y.sigmoid() if self.spelled else y
        w = self.levels(y, z) if self.spelled else self.levels(y)
        w += 1
        return self.last(w + (z if self.again else 0))


@pytest.mark.parametrize("spelled", [False, True])
def test_a_quantizer_in_float_returns_its_input(spelled: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [Written(again, spelled).eval() for again in (False, True)]
    for model in models:
        model_graph(model, qg.Threat(), None, X)
    with qg.bypass(models[0]):
        qg.certify(models[0], [(X, Y)], qg.Threat(eps=0.05), progress=False)
    with qg.bypass(models[1]), pytest.raises(ConversionError, match="is read again"):
        model_graph(models[1], qg.Threat(), None, X)
