"""The budget limits the whole call; these models sleep to take time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantguard as qg
from quantguard.attacks import PGD, Entry
from quantguard.core.specs import Threat
from quantguard.evaluation.results import Evaluation
from quantguard.evaluation.time_limit import Budget


class Sleeping(nn.Module):
    """A linear net that takes a stated time for each image, and counts its calls."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.seconds = nn.Linear(3 * 64, 4), seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds * len(x))
        logits: Tensor = self.net(x.flatten(1))
        return logits


def data(model: nn.Module, n: int = 20) -> list[tuple[Tensor, Tensor]]:
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x).argmax(1)
    return [(x, y)]


@pytest.mark.parametrize(("eps", "suite"), [(1e-4, "standard"), (1e-4, [PGD("ce", 5)]),
                                            (0.3, "quick")])
def test_a_whole_call_stays_within_its_budget_and_lists_what_it_left_out(eps: float, suite: Any,
                                                                         tmp_path: Path) -> None:
    model = Sleeping(0.004)
    images, start = data(model), time.monotonic()
    result = qg.evaluate(model, images, Threat(eps=eps), suite=suite, budget=4.0, progress=False)
    took = time.monotonic() - start
    assert took < 6.0, took  # without one fidelity alone takes 2560 images of 4 ms
    assert any(name.startswith("fidelity (done: ") for name in result.skipped)
    flag = {f.name: f for f in result.flags}["attacks left out"]
    assert flag.raised and "fidelity" in flag.reason
    assert all(name in str(result) for name in result.skipped)
    if result.survived.any():
        assert result.verdict == "undecided" and result.conclusion == "not settled"
    if suite == "standard":
        assert any("curve's attack" in name for name in result.skipped)
        assert "PGD-50" in result.skipped  # an attack that cannot fit is not begun
    # a replay leaves the same out, whatever the clock says
    result.save(tmp_path / "r.json")
    model.seconds = 0
    again = qg.evaluate(model, images, suite=suite, progress=False,
                        replay=Evaluation.load(tmp_path / "r.json"))
    assert again.skipped == result.skipped and again.flags == result.flags
    assert [p.eps for p in again.curve] == [p.eps for p in result.curve]
    assert [a.label for a in again.attacks] == [a.label for a in result.attacks]
    assert again.fidelity == pytest.approx(result.fidelity, abs=1e-5)


def test_a_check_that_did_not_run_is_listed() -> None:
    model = Sleeping(0.02)
    result = qg.evaluate(model, data(model), Threat(eps=1e-4), budget=1.0, progress=False,
                         suite=[Entry("one", PGD("ce", 1), "pgd", True)])
    clear = {f.name for f in result.flags if not f.raised}
    for name in ("zero input gradients", "survives without bounds"):
        assert name not in clear or any(entry.startswith(name) for entry in result.skipped)
    assert any(entry.startswith("survives without bounds") for entry in result.skipped)
    assert result.verdict == "undecided"


def test_an_ample_budget_changes_nothing() -> None:
    model = Sleeping(0.0)
    one, two = (qg.evaluate(model, data(model), Threat(eps=0.01), suite=[PGD("ce", 5)],
                            progress=False, budget=b) for b in (None, 1000.0))
    assert not two.skipped and one.flags == two.flags and one.fidelity == two.fidelity


def test_few_images_are_not_padded_to_a_batch() -> None:
    class Counting(Sleeping):
        asked = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.asked += len(x)
            return super().forward(x)
    model = Counting(0)
    images = data(model, 5)
    Counting.asked = 0
    result = qg.evaluate(model, images, Threat(eps=1e-4), suite=[PGD("ce", 3)], progress=False)
    assert result.survived.all()
    # predictions, 128 directions and a gradient, the attack, three predictions, 2 + 20 gradients
    assert Counting.asked < 5 * (1 + 129 + 4 + 3 + 2 + 21 + 10)


def test_fitting_returns_the_number_of_images_that_fit() -> None:
    now = time.monotonic()
    budget = Budget(10.0, now)
    assert budget.fitting("a", 5, 1.0) == 5 and not budget.skipped
    assert budget.fitting("b", 50, 1.0) in (8, 9)
    assert budget.fitting("c", 50, 1.0, reserve=7) in (1, 2)
    assert budget.fitting("d", 50, 1.0, whole=True) == 0
    assert budget.fitting("e", 0, 1.0) == 0 and budget.fitting("f", 7, 0.0) == 7
    assert [name[0] for name in budget.skipped] == ["b", "c", "d"]
    again = Budget(1.0, now - 99, budget.skipped)
    assert again.fitting("b", 50, 1.0) in (8, 9) and again.fitting("d", 50, 1.0) == 0
    assert again.fitting("a", 5, 1.0) == 5 and again.skipped == budget.skipped
    late = Budget(1.0, now - 99)
    assert late.fitting("x", 3, 0.0) == 0 and late.skipped == ["x (done: 0 of 3 images)"]
    assert Budget(None, now).fitting("x", 3, 1e9) == 3
