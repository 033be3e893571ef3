"""Run directories: interrupted evaluations resume to the same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_suites import EPS, Digits, Untouched, batches, measured
from torch import nn

import quantguard as qg
from quantguard.attacks import PGD, Noise
from quantguard.core.errors import SpecError
from quantguard.core.specs import Threat


class Interrupted(PGD):
    """Raise KeyboardInterrupt at the n-th call."""

    left: int | None = None

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            **kwargs: Any) -> Any:
        if Interrupted.left is not None:
            Interrupted.left -= 1
            if Interrupted.left < 0:
                raise KeyboardInterrupt
        return super().run(model, inputs, criterion, epsilon=epsilon)


def test_an_interrupted_evaluation_resumes_to_the_same_result(quantized: nn.Module, digits: Digits,
                                                              tmp_path: Path,
                                                              untouched: Untouched,
                                                              monkeypatch: pytest.MonkeyPatch,
                                                              ) -> None:
    loader = batches(digits, 150)
    suite = [Noise("linf", 3), Interrupted("ce", 3), Interrupted("margin", 5, sharpness=(2, 16)),
             PGD("ce", 3)]
    whole = measured(quantized, loader, suite=suite)
    monkeypatch.setattr(Interrupted, "left", 4)  # in the third attack's second batch
    with pytest.raises(qg.core.errors.Interrupted, match="after 2 of 4 attacks; saved in"), \
            untouched(quantized):
        measured(quantized, loader, suite=suite, run_dir=tmp_path / "run")
    monkeypatch.setattr(Interrupted, "left", 3)  # the first two attacks are not run again
    resumed = measured(quantized, loader, suite=suite, run_dir=tmp_path / "run")
    assert np.array_equal(resumed.adversarials, whole.adversarials)
    assert np.array_equal(resumed.survived, whole.survived)
    assert resumed.flags == whole.flags
    for one, two in zip(resumed.attacks, whole.attacks, strict=True):
        assert np.array_equal(one.broken, two.broken) and np.array_equal(one.attacked, two.attacked)
        assert (one.settings, one.queries, one.gradients) == (two.settings, two.queries,
                                                              two.gradients)
    again = measured(quantized, loader, suite=suite, run_dir=tmp_path / "run")  # nothing left to do
    assert np.array_equal(again.adversarials, whole.adversarials)


@pytest.mark.parametrize("change", ["eps", "seed", "suite", "images", "model"])
def test_a_run_dir_with_other_settings_is_an_error(
        change: str, cnn: nn.Module, quantized: nn.Module, digits: Digits, tmp_path: Path) -> None:
    model, threat, suite, seed, n = quantized, Threat(eps=EPS), [PGD("ce", 2)], 0, 20
    measured(model, batches(digits, n), threat, suite=suite, seed=seed, run_dir=tmp_path)
    name = {"eps": "threat", "model": "the model's predictions",
            "suite": "the attacks"}.get(change, change)
    model = cnn if change == "model" else model
    threat = Threat(eps=0.05) if change == "eps" else threat
    suite = [PGD("ce", 3)] if change == "suite" else suite
    with pytest.raises(SpecError, match=f"other settings(.|\n)*{name}(.|\n)*another run directory"):
        measured(model, batches(digits, n + (change == "images")), threat, suite=suite,
                 seed=seed + (change == "seed"), run_dir=tmp_path)
