"""Accuracy over eps: it falls, agrees with the headline, and counts what it breaks."""

from __future__ import annotations

from dataclasses import replace
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
from quantguard.core.specs import Threat
from quantguard.evaluation import eps_curve as curve
from quantguard.evaluation import evaluator as evaluation
from quantguard.evaluation.comparison import compare
from quantguard.evaluation.results import Evaluation


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the suite ``quick`` to a few steps of every attack."""
    monkeypatch.setitem(suites._SUITES, "quick", (4, 20, 60))


@pytest.mark.slow
def test_accuracy_falls_from_clean_to_nothing(cnn: nn.Module, quantized: nn.Module,
                                              digits: Digits) -> None:
    loader = DataLoader(TensorDataset(digits[0][:60], digits[1][:60]), batch_size=60)
    for model in (cnn, quantized):
        result = qg.evaluate(model, loader, Threat(eps=0.1), suite="quick", progress=False)
        survivors = [point.survivors for point in result.curve]
        assert survivors == sorted(survivors, reverse=True) and survivors[-1] == 0
        assert survivors[0] == int(result.correct.sum())
        at = {point.eps: point.survivors for point in result.curve}
        assert list(at)[:4] == [0.0, 0.025, 0.05, 0.1] and at[0.1] == int(result.survived.sum())
        assert "Accuracy over eps" in str(result) and "<svg" in result._repr_html_()


def test_images_that_the_curve_breaks_within_the_threat_count(quantized: nn.Module, digits: Digits,
                                                              monkeypatch: pytest.MonkeyPatch,
                                                              tmp_path: Path) -> None:
    # a suite that breaks almost nothing, as under a small budget, while the curve's attack does
    suite = Suite([entry("first", breaks=2)], curve=40)
    monkeypatch.setattr(evaluation, "build_suite", lambda *_, **__: suite)
    loader = DataLoader(TensorDataset(digits[0][:60], digits[1][:60]), batch_size=30)

    def measured(**options: Any) -> Evaluation:
        return qg.evaluate(quantized, loader, Threat(eps=0.15), suite=suite.entries,
                           progress=False, **options)
    result = measured(run_dir=tmp_path)
    last = result.attacks[-1]
    assert last.label == curve.LABEL and last.broken[:40].sum() > 10 and last.broken[40:].any()
    at = {point.eps: point.survivors for point in result.curve}
    assert int(result.survived.sum()) == at[0.15]
    # the adversarials are misclassified
    x = torch.from_numpy(result.adversarials)
    broken = result.correct & ~result.survived
    with torch.no_grad():
        wrong = (quantized(x).argmax(1) != digits[1][:60]).numpy()
    assert wrong[broken & last.broken].all()
    assert (x - digits[0][:60]).abs().max() <= 0.15 + 1e-6
    # a resumed run and a replay give the same
    for other in (measured(run_dir=tmp_path),
                  measured(replay=Evaluation.from_dict(result.to_dict()))):
        assert np.array_equal(other.survived, result.survived) and labels(other) == labels(result)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_curve_ends_where_any_pixel_may_take_any_value(norm: str,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve, "_broken",
                        lambda _, task, *__: np.zeros(len(task.correct), dtype=bool))
    loader = dim(10)
    result = qg.evaluate(Bright(), loader, Threat(norm, 0.01), suite="quick", progress=False,
                         images=10)
    assert result.curve[-1].eps == pytest.approx(1.0 if norm == "linf" else 4.0)


def test_an_attack_that_breaks_less_at_larger_eps_is_flagged(
        monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(attack: Any, task: Any, rows: Any, eps: float, found: Any) -> np.ndarray:
        return np.arange(len(task.correct)) < (40 if eps < 0.2 else 0)
    monkeypatch.setattr(curve, "_broken", broken)
    result = qg.evaluate(Bright(), dim(60), Threat(eps=0.01), suite="quick", progress=False)
    flag = {f.name: f for f in result.flags}["not monotone in eps"]
    assert flag.raised and flag.value > 0


def test_the_curve_at_the_threats_eps_is_the_headline(cnn: nn.Module, quantized: nn.Module,
                                                      digits: Digits,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites._SUITES, "quick", (4, 20, 30))
    x, y = digits[0][:80], digits[1][:80]  # more than the 30 that are attacked at each eps
    threat = Threat(eps=0.1)
    both = compare({"float": cnn, "2 bits": quantized}, [(x, y)], threat, suite="quick",
                   progress=False)
    for result in both.rows.values():
        points = {p.eps: p for p in result.curve}
        assert {p.images for p in result.curve} == {80}
        assert points[0.0].survivors == int(result.correct.sum())
        assert points[threat.eps].survivors == int(result.survived.sum())
        survivors = [p.survivors for p in result.curve]
        assert survivors == sorted(survivors, reverse=True)
        assert "the same 80 images" in str(result)
    old = replace(result, curve=tuple(replace(p, images=30) for p in result.curve))
    assert "the first 30 of 80 images" in str(old)
