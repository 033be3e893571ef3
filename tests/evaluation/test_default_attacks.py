"""Flags of whole evaluations: masked gradients, zero gradients, few survivors."""

from __future__ import annotations

import pytest
from evaluation_suites import Bright, Digits, Stub, batches, grey, measured, raised
from torch import Tensor, nn

import quantguard as qg
from quantguard.attacks import Entry
from quantguard.core.specs import Threat
from quantguard.evaluation.results import Evaluation

MASKED = {"default attacks overstate": "masked"}


@pytest.mark.parametrize(("strong", "weak", "expected"), [
    ("noise", "pgd", {"noise beats white-box": "unresolved", **MASKED}),
    ("transfer", "pgd", {"transfer beats white-box": "unresolved", **MASKED}),
    ("fgsm", "pgd", {"one step beats many": "unresolved"}), ("softened", "pgd", MASKED),
    ("modes", "pgd", MASKED), ("pgd", "noise", {}), ("pgd", "softened", {}), ("pgd", "fgsm", {})])
def test_each_flag_compares_its_attacks(strong: str, weak: str,
                                        expected: dict[str, str]) -> None:
    loader = grey(*[0.45] * 20, *[0.1] * 180)
    result = measured(Bright(), loader, suite=[
        Entry("strong", Stub(0.1), strong, True), Entry("weak", Stub(-0.1), weak, True)])
    assert result.survived.sum() == 180
    assert raised(result) == expected
    assert result.verdict == ("unresolved" if "unresolved" in expected.values() else "resolved")
    assert result.reliable == (result.verdict == "resolved")


class ZeroGradient(nn.Module):
    """A model behind an operation whose gradient is zero."""

    def __init__(self, model: nn.Module, how: str) -> None:
        super().__init__()
        self.model, self.how = model, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "round":
            return self.model((x * 4).round() / 4)
        if self.how == "compare":
            return self.model((x > 0.5).float())
        return self.model(x.detach())


@pytest.mark.parametrize("how", [
    "round", "compare", pytest.param("detach", marks=pytest.mark.slow)])
def test_zero_gradients_are_unresolved_and_not_robust(how: str, cnn: nn.Module,
                                                      quantized: nn.Module,
                                                      digits: Digits) -> None:
    for model in (cnn, quantized):
        result = measured(ZeroGradient(model, how).eval(), batches(digits, 60))
        assert result.survived.any()
        assert raised(result)["zero input gradients"] == "unresolved"
        assert result.verdict == "unresolved" and not result.reliable


@pytest.mark.slow
def test_a_sound_float_model_is_neither_masked_nor_unresolved(cnn: nn.Module,
                                                              digits: Digits) -> None:
    result = qg.evaluate(cnn, batches(digits, 250), Threat(eps=0.05), suite="quick",
                         progress=False)
    assert result.correct.sum() > result.survived.sum() > 150
    assert raised(result) == {}
    assert result.verdict == "resolved" and result.reliable
    assert {a.group for a in result.attacks} == {
        "noise",
        "fgsm",
        "pgd",
        "scaled",
        "modes",
        "softened",
        "escalation",
        "reseeded",
        "black-box",
    }


def test_default_attacks_overstate_a_quantized_model(result: Evaluation) -> None:
    assert raised(result)["default attacks overstate"] == "masked"
    assert "[masked]" in str(result)


def test_few_survivors_are_undecided(cnn: nn.Module, digits: Digits) -> None:
    result = measured(cnn, batches(digits, 20))
    assert result.verdict == "undecided" and "Undecided" in str(result)
