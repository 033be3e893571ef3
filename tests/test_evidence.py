"""Flags about the model and the evaluation: each is raised by what it is there for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantguard as qg
from quantguard import masking
from quantguard.attacks import PixelModel
from quantguard.budget import Budget
from quantguard.evidence import are_probabilities, fidelity, saturated
from quantguard.images import Images
from quantguard.results import Evaluation
from quantguard.running import frozen
from quantguard.spec import Threat

Digits = tuple[Tensor, Tensor]
THREAT = Threat(eps=0.1)


class Around(nn.Module):
    """A model and what is done to its input or its logits."""

    def __init__(self, model: nn.Module, before: Any = None, after: Any = None) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x if self.before is None else self.before(x))
        return y if self.after is None else self.after(y)


def measured(model: nn.Module, digits: Digits, n: int = 200) -> Evaluation:
    return qg.evaluate(model.eval(), [tuple(t[:n] for t in digits)], THREAT, suite="quick",
                       progress=False)


def raised(result: Evaluation) -> dict[str, str]:
    return {flag.name: flag.kind for flag in result.flags if flag.raised}


@pytest.fixture(scope="module")
def sound(cnn: nn.Module, digits: Digits) -> Evaluation:
    result = measured(cnn, digits)
    assert not {k for k, kind in raised(result).items() if kind != "undecided"}
    return result


@pytest.mark.parametrize("where", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_a_random_forward_has_no_figure(where: str, cnn: nn.Module, digits: Digits) -> None:
    def noisy(v: Tensor) -> Tensor:
        return F.dropout(v, 0.1, training=True)
    result = measured(Around(cnn, **{where: noisy}), digits, 64)
    assert raised(result)["random forward"] == "unresolved"
    assert "Robust accuracy" not in str(result).splitlines()[0] and "NO FIGURE" in str(result)


@pytest.mark.slow
def test_batchnorm_over_the_batch_has_no_figure(cnn: nn.Module, digits: Digits) -> None:
    def normed(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)
    result = measured(Around(cnn, normed), digits, 200)
    assert raised(result)["depends on its batch"] == "unresolved" and "NO FIGURE" in str(result)


@pytest.mark.slow
def test_a_softmax_is_said_and_seen_through(cnn: nn.Module, digits: Digits,
                                            sound: Evaluation) -> None:
    result = measured(Around(cnn, after=lambda y: y.softmax(1)), digits)
    assert raised(result)["softmax outputs"] == "masked"
    assert abs(int(result.survived.sum()) - int(sound.survived.sum())) <= 2


@pytest.mark.parametrize("scale", [pytest.param(30.0, marks=pytest.mark.slow), 100.0])
def test_saturated_logits_are_said_and_seen_through(scale: float, cnn: nn.Module, digits: Digits,
                                                    sound: Evaluation) -> None:
    result = measured(Around(cnn, after=lambda y: y * scale), digits)
    found = raised(result)
    assert found["saturated logits"] == "masked" or found["default attacks overstate"] == "masked"
    assert abs(int(result.survived.sum()) - int(sound.survived.sum())) <= 2


@pytest.mark.slow
def test_queries_alone_break_what_has_no_gradient(cnn: nn.Module, digits: Digits) -> None:
    result = measured(Around(cnn, lambda x: (x * 8).round() / 8), digits)
    found = raised(result)
    assert {"zero input gradients", "black-box beats white-box",
            "survives without bounds"} <= set(found)
    assert result.verdict == "unresolved"


def test_what_looks_like_probabilities() -> None:
    z = torch.randn(50, 4)
    assert are_probabilities(z.softmax(1)) and not are_probabilities(z)
    assert not are_probabilities(z.abs()) and not are_probabilities(z.softmax(1) * 2)


def test_saturation_looks_at_the_correct_images_alone() -> None:
    z, y = torch.zeros(100, 3), torch.zeros(100, dtype=torch.long)
    z[:, 0] = 1.0
    z[:5, 0] = 20.0
    assert saturated(z, y) and not saturated(z, y + 1)
    z[:5, 0] = 11.0
    assert not saturated(z, y)


@pytest.mark.parametrize(("flag", "raises"), [
    (masking.modes_disagree(8, 200), True), (masking.modes_disagree(3, 200), False),
    (masking.modes_disagree(8, 1000), False), (masking.saturated_logits(12, 1, 200), True),
    (masking.saturated_logits(12, 9, 200), False), (masking.saturated_logits(1, 12, 200), False),
    (masking.random_forward(1, 64), True), (masking.random_forward(0, 64), False),
    (masking.looks_at_its_batch(1, 64), False), (masking.looks_at_its_batch(3, 64), True),
    (masking.unbounded(20, 200), True), (masking.unbounded(0, 200), False),
    (masking.escalation_pays([9, 1, 5], 3, 500), True),
    (masking.escalation_pays([9, 1, 2], 3, 500), False),
    (masking.escalation_pays([9, 5], 3, 500), False), (masking.escalation_pays([], 3, 500), False)])
def test_when_each_speaks(flag: masking.Flag, raises: bool) -> None:
    assert flag.raised == raises and flag.reason and flag.test


def faithful(model: nn.Module, digits: Digits, norm: str = "linf", n: int = 40) -> dict[str, float]:
    x, y = digits[0][:n], digits[1][:n]
    threat = Threat(norm, 0.1 if norm == "linf" else 0.5)
    with frozen(model):
        return fidelity(PixelModel(model.eval(), threat), Images(x, y), np.ones(n, dtype=bool),
                        threat, 64, 0, Budget(None, 0.0))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fidelity_is_1_where_the_gradient_tells_all(norm: str, digits: Digits) -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    labels = digits[1] % 2
    assert faithful(linear, (digits[0], labels), norm)["gradient"] > 0.999

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return -g
    wrong = faithful(Around(linear, Wrong.apply), (digits[0], labels), norm)
    assert wrong["gradient"] < -0.999
    blind = faithful(Around(linear, lambda x: x.detach()), (digits[0], labels), norm)
    assert blind["gradient"] == 0


def test_fidelity_of_a_staircase_is_lower_and_shown(cnn: nn.Module, quantized: nn.Module,
                                                    digits: Digits, sound: Evaluation) -> None:
    float_net, steps = faithful(cnn, digits), faithful(quantized, digits)
    assert set(steps) == {"ramp", "sigmoid(8)", "twin k 8", "softened k 2, of itself"}
    assert steps["softened k 2, of itself"] > 0.8 and float_net["gradient"] > 0.8
    assert max(steps[k] for k in ("ramp", "sigmoid(8)", "twin k 8")) < float_net["gradient"]
    assert set(sound.fidelity) == {"gradient"} and "Fidelity" in str(sound)
    assert Evaluation.from_dict(sound.to_dict()).fidelity == sound.fidelity
