"""Arguments that every verb refuses in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fine_tuning import THREAT
from torch import nn
from torch.utils.data import DataLoader

import quantguard as qg
from quantguard.core.errors import ConversionError, QuantguardError, SpecError


@pytest.mark.parametrize("verb", [qg.evaluate, qg.certify, qg.harden])
def test_a_number_is_no_threat(verb: Any, cnn: nn.Module, loader: DataLoader[Any]) -> None:
    with pytest.raises(SpecError, match=r"Write Threat\(eps=0.1\)"):
        verb(cnn, loader, 0.1, progress=False)


@pytest.mark.parametrize("seed", [-1, 1.5, 1 << 32, "0"])
def test_an_impossible_seed_is_refused_before_any_work(
        seed: Any, quantized: nn.Module, cnn: nn.Module, loader: DataLoader[Any]) -> None:
    for verb in (qg.harden, qg.evaluate, qg.sensitivity):
        with pytest.raises(SpecError, match=f"seed={seed!r} must be an integer from 0 to 42949"):
            verb(quantized, loader, seed=seed, progress=False)
    with pytest.raises(SpecError, match="seed="):
        qg.ablate(cnn, loader, None, seed=seed, progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["function", "lazy"])
def test_functions_and_lazy_models_are_refused_and_do_not_change(
        kind: str, loader: DataLoader[Any], tmp_path: Path) -> None:
    last = nn.LazyLinear(10) if kind == "lazy" else nn.Linear(8, 10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), last)
    message = {"function": "is a function(.|\n)*in the forward of an nn.Module",
            "lazy": "3.weight(.|\n)* no shape yet(.|\n)*once on a batch"}[kind]
    candidate: Any = (lambda x: x) if kind == "function" else model
    for verb in (qg.evaluate, qg.certify):
        with pytest.raises(ConversionError, match=message):
            verb(candidate, loader, THREAT, progress=False)
    with pytest.raises(ConversionError, match=message):
        qg.ablate(candidate, loader, None, THREAT, progress=False)  # type: ignore[arg-type]
    if kind == "function":
        for verb in (qg.harden, qg.sensitivity):
            with pytest.raises(ConversionError, match=message):
                verb(candidate, loader, THREAT, progress=False)
    if kind == "lazy":
        with pytest.raises(ConversionError, match=message):
            qg.convert(candidate)
    with pytest.raises(QuantguardError, match=message.replace("3.weight", "")):
        qg.save(candidate, tmp_path / "m.qg")
    assert all(p.requires_grad for p in model.parameters())
