"""A run directory belongs to one model with one set of settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from averaging_model import Averaging, X, Y
from torch import nn

import quantguard as qg


def test_a_run_directory_belongs_to_one_model(tmp_path: Path) -> None:
    model, threat = Averaging().eval(), qg.Threat(eps=0.01)
    qg.certify(model, [(X, Y)], threat, run_dir=tmp_path, progress=False)
    with torch.no_grad():  # the logits at the images stay the same
        model.head.weight[0, 0] += 0.2
        model.head.weight[0, 1] -= 0.2
    with pytest.raises(qg.SpecError, match="other settings"):
        qg.certify(model, [(X, Y)], threat, run_dir=tmp_path, progress=False)


def _pooled(**settings: Any) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(3, 2, 1, **settings), nn.Flatten(), nn.Linear(16, 2))


def _after(function: nn.Module | None, axis: int = 1) -> nn.Module:
    levels = qg.QuantActivation(qg.QuantSpec(2, per_channel=True), function, channels=4, axis=axis)
    return nn.Sequential(nn.Unflatten(1, (4, 4)), levels, nn.Flatten(), nn.Linear(16, 2))


@pytest.mark.parametrize(("one", "other"), [
    (lambda: _pooled(), lambda: _pooled(count_include_pad=False)),
    (lambda: _pooled(), lambda: _pooled(divisor_override=2)),
    (lambda: _after(nn.LeakyReLU(0.1)), lambda: _after(nn.LeakyReLU(0.2))),
    (lambda: _after(nn.Hardtanh()), lambda: _after(nn.Hardtanh(-1, 2))),
    (lambda: _after(None, 1), lambda: _after(None, -1)),
])
def test_a_run_directory_belongs_to_one_models_settings(
        one: Callable[[], nn.Module], other: Callable[[], nn.Module], tmp_path: Path) -> None:
    first, second = one().eval(), other().eval()
    second.load_state_dict(first.state_dict())
    shape = (4, 1, 8, 8) if isinstance(first[0], nn.AvgPool2d) else (4, 16)
    data = [(torch.zeros(shape), Y)]
    for model in (first, first):
        qg.certify(model, data, qg.Threat(eps=0.01), run_dir=tmp_path, progress=False)
    with pytest.raises(qg.SpecError, match="other settings"):
        qg.certify(second, data, qg.Threat(eps=0.01), run_dir=tmp_path, progress=False)
