"""Single attacks: what they cost, what a failed one leaves, and batches of one image."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from evaluation_suites import Digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.attacks import PGD, Entry, Square
from quantguard.attacks.base import fb
from quantguard.core.errors import QuantguardError
from quantguard.core.specs import Threat
from quantguard.evaluation.comparison import compare
from quantguard.evaluation.report.text import columns
from quantguard.evaluation.results import Evaluation


def test_passes_are_counted_in_a_partial_batch_too(
        cnn: nn.Module, digits: Digits) -> None:
    loader = DataLoader(TensorDataset(digits[0][:70], digits[1][:70]), batch_size=70)
    suite = [Entry("PGD", PGD("ce", 3, norm="linf"), "pgd")]
    result = qg.evaluate(cnn, loader, Threat(eps=1e-4), suite=suite, progress=False)
    n = int(result.correct.sum())
    assert n == int(result.survived.sum()) > 64  # two batches of 64
    assert abs(result.attacks[0].gradients - 3 * n) <= 1
    assert abs(result.attacks[0].queries - 4 * n) <= 1


def test_a_single_image_is_never_passed_to_a_forward_that_squeezes(
        cnn: nn.Module, digits: Digits) -> None:
    class Squeezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = cnn

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).squeeze()  # type: ignore[no-any-return]

    right = (cnn(digits[0]).argmax(1) == digits[1]).nonzero().flatten()[:65]
    loader = [(digits[0][right], digits[1][right])]
    suite = [Entry("PGD", PGD("ce", 3), "pgd"), Entry("Square", Square(20), "black-box")]
    result = qg.evaluate(Squeezing(), loader, Threat(eps=1e-4), suite=suite, progress=False)
    assert result.survived.all() and result.attacks[0].gradients == 3 * 65


def test_one_attack_alone_is_a_suite_of_one(cnn: nn.Module, digits: Digits) -> None:
    x, y = digits[0][:20], digits[1][:20]
    for attack in (fb.attacks.LinfPGD(steps=3), PGD("ce", 3), Entry("mine", PGD("ce", 3), "pgd")):
        alone, one = (qg.evaluate(cnn, [(x, y)], Threat(eps=0.1), suite=suite, progress=False)
                      for suite in (attack, [attack]))
        assert np.array_equal(alone.survived, one.survived) and len(alone.attacks) == 1
    rows = compare({"a": cnn}, [(x, y)], Threat(eps=0.1), suite=PGD("ce", 3), progress=False).rows
    assert len(rows["a"].attacks) == 1
    for nothing in (7, None, {"quick": 1}, [], [None]):
        with pytest.raises(QuantguardError):
            qg.evaluate(cnn, [(x, y)], suite=nothing, progress=False)  # type: ignore[arg-type]


class Raising(PGD):
    """Run PGD on the first batches, then raise an error."""

    def __init__(self, after: int) -> None:
        super().__init__("ce", 10)
        self.after = after

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.after -= 1
        if self.after < 0:
            raise ValueError("no more\nof this")
        return super().run(*args, **kwargs)


@pytest.mark.parametrize("after", [0, 1])
def test_an_attack_that_raises_is_a_row_and_the_others_count(after: int, cnn: nn.Module,
                                                             digits: Digits,
                                                             untouched: Any) -> None:
    x, y = digits[0][:90], digits[1][:90]
    with untouched(cnn):
        result = qg.evaluate(cnn, [(x, y)], Threat(eps=0.1), progress=False, suite=[
            Raising(after), fb.attacks.DatasetAttack(), fb.attacks.LinfPGD(steps=2)])
    alone = qg.evaluate(cnn, [(x, y)], Threat(eps=0.1), progress=False,
                        suite=[fb.attacks.LinfPGD(steps=2)])
    first, second, third = result.attacks
    assert first.error == "ValueError: no more" and int(first.attacked.sum()) == 64 * after
    assert bool(first.broken.any()) == bool(after) and not (first.broken & ~first.attacked).any()
    assert second.error and not second.attacked.any() and third.error is None
    assert (result.survived <= alone.survived).all() and not result.survived.all()
    assert result.verdict != "resolved"
    flag = {f.name: f for f in result.flags}["attacks failed"]
    assert flag.raised and flag.kind == "undecided" and "DatasetAttack 2" in flag.reason
    assert "Raising 1: ValueError: no more" in str(result)
    data = json.loads(json.dumps(result.to_dict()))
    assert [a.error for a in Evaluation.from_dict(data).attacks] == [
        a.error for a in result.attacks]
    assert "Raising 1" not in columns(result)  # it would be of fewer images


def test_where_every_attack_raises_there_is_no_figure(cnn: nn.Module, digits: Digits) -> None:
    with pytest.raises(QuantguardError, match="Raising 1 failed: ValueError: no more"):
        qg.evaluate(cnn, [(digits[0][:9], digits[1][:9])], suite=[Raising(0)], progress=False)
