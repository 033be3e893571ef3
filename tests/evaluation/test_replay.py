"""Replays of saved evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_suites import Bright, Digits, dim, entry, labels
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.attacks import Suite, suites
from quantguard.core.errors import DataError, SpecError
from quantguard.core.specs import Threat
from quantguard.evaluation import evaluator as evaluation
from quantguard.evaluation.results import Evaluation


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the suite ``quick`` to a few steps of every attack."""
    monkeypatch.setitem(suites._SUITES, "quick", (4, 20, 60))


def test_a_replay_runs_the_same_attacks_whatever_the_clock_says(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite([entry("first", seconds=0.1), entry("long", steps=100, seconds=1),
                   entry("short", breaks=7)])
    # "long" would take 100 times as long as the first
    monkeypatch.setattr(evaluation, "build_suite", lambda *_, **__: suite)
    options: dict[str, Any] = {"suite": "quick", "progress": False}
    one = qg.evaluate(Bright(), dim(60), Threat(eps=0.2), budget=6.0, **options)
    assert one.skipped == ("long",)
    one.save(tmp_path / "one.json")
    two = qg.evaluate(Bright(), dim(90), Threat(eps=0.7), seed=9, progress=False,
                      replay=Evaluation.load(tmp_path / "one.json"))
    assert labels(two) == labels(one) and np.array_equal(two.survived, one.survived)
    assert (two.threat, two.seed, two.images) == (one.threat, one.seed, 60)
    assert two.skipped == one.skipped and two.verdict == one.verdict != "resolved"
    other = DataLoader(TensorDataset(torch.full((60, 1, 4, 4), 0.4), torch.zeros(60).long()))
    with pytest.raises(DataError, match="not the images"):
        qg.evaluate(Bright(), other, replay=one, progress=False)
    suite.entries[0] = entry("renamed", seconds=0.1)
    with pytest.raises(SpecError, match="ran first, which its suite does not have"):
        qg.evaluate(Bright(), dim(60), replay=one, progress=False)


@pytest.mark.slow
def test_a_real_suite_replayed_gives_the_same_masks(quantized: nn.Module, digits: Digits,
                                                    tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(digits[0][:40], digits[1][:40]), batch_size=16)
    one = qg.evaluate(quantized, loader, Threat(eps=0.1), suite="quick", progress=False, seed=3)
    one.save(tmp_path / "one.json")
    two = qg.evaluate(quantized, loader, progress=False,
                      replay=Evaluation.load(tmp_path / "one.json"))
    assert labels(one) == labels(two) and one.curve == two.curve and one.flags == two.flags
    for a, b in zip(one.attacks, two.attacks, strict=True):
        assert np.array_equal(a.broken, b.broken) and a.settings == b.settings


@pytest.mark.parametrize("text", ["", "[1]", '{"format": 9}', None])
def test_a_file_that_is_no_evaluation_is_an_error(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "e.json").write_text(text)
    with pytest.raises(DataError):
        Evaluation.load(tmp_path / "e.json")
