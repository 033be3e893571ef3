"""Flags of the model and of the evaluation: each is raised by a model that has the problem."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_suites import Digits
from torch import Tensor, nn

import quantguard as qg
from quantguard.attacks import PixelModel
from quantguard.core.module_utils import frozen
from quantguard.core.specs import Threat
from quantguard.data.images import Images
from quantguard.evaluation.attack_flags import (
    backward_modes_disagree,
    escalation_still_pays,
    saturated_logits,
)
from quantguard.evaluation.fidelity import fidelity
from quantguard.evaluation.flags import Flag
from quantguard.evaluation.model_checks import are_probabilities, saturated
from quantguard.evaluation.model_flags import (
    depends_on_its_batch,
    random_forward,
    survives_without_bounds,
)
from quantguard.evaluation.results import Evaluation
from quantguard.evaluation.task import EvaluationTask
from quantguard.evaluation.time_limit import Budget

THREAT = Threat(eps=0.1)


class Around(nn.Module):
    """A model with a function before or after it."""

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
def test_a_softmax_is_flagged_and_attacked_as_logits(cnn: nn.Module, digits: Digits,
                                                     sound: Evaluation) -> None:
    result = measured(Around(cnn, after=lambda y: y.softmax(1)), digits)
    assert raised(result)["softmax outputs"] == "masked"
    assert abs(int(result.survived.sum()) - int(sound.survived.sum())) <= 2


@pytest.mark.parametrize("scale", [pytest.param(30.0, marks=pytest.mark.slow), 100.0])
def test_saturated_logits_are_flagged_and_rescaled(scale: float, cnn: nn.Module, digits: Digits,
                                                   sound: Evaluation) -> None:
    result = measured(Around(cnn, after=lambda y: y * scale), digits)
    found = raised(result)
    assert found["saturated logits"] == "masked" or found["default attacks overstate"] == "masked"
    assert abs(int(result.survived.sum()) - int(sound.survived.sum())) <= 2


@pytest.mark.slow
def test_a_model_without_gradients_is_broken_by_queries_alone(
        cnn: nn.Module, digits: Digits) -> None:
    result = measured(Around(cnn, lambda x: (x * 8).round() / 8), digits)
    found = raised(result)
    assert {"zero input gradients", "black-box beats white-box",
            "survives without bounds"} <= set(found)
    assert result.verdict == "unresolved"


def test_probabilities_are_recognised() -> None:
    z = torch.randn(50, 4)
    assert are_probabilities(z.softmax(1)) and not are_probabilities(z)
    assert not are_probabilities(z.abs()) and not are_probabilities(z.softmax(1) * 2)


def test_saturation_counts_correct_images_only() -> None:
    z, y = torch.zeros(100, 3), torch.zeros(100, dtype=torch.long)
    z[:, 0] = 1.0
    z[:5, 0] = 20.0
    assert saturated(z, y) and not saturated(z, y + 1)
    z[:5, 0] = 11.0
    assert not saturated(z, y)


@pytest.mark.parametrize(("flag", "raises"), [
    (backward_modes_disagree(8, 200), True), (backward_modes_disagree(3, 200), False),
    (backward_modes_disagree(8, 1000), False), (saturated_logits(12, 1, 200), True),
    (saturated_logits(12, 9, 200), False), (saturated_logits(1, 12, 200), False),
    (random_forward(1, 64), True), (random_forward(0, 64), False),
    (depends_on_its_batch(1, 64), False), (depends_on_its_batch(3, 64), True),
    (survives_without_bounds(20, 200), True), (survives_without_bounds(0, 200), False),
    (escalation_still_pays([9, 1, 5], 3, 500), True),
    (escalation_still_pays([9, 1, 2], 3, 500), False),
    (escalation_still_pays([9, 5], 3, 500), False), (escalation_still_pays([], 3, 500), False)])
def test_when_each_flag_is_raised(flag: Flag, raises: bool) -> None:
    assert flag.raised == raises and flag.reason and flag.test


def faithful(model: nn.Module, digits: Digits, norm: str = "linf", n: int = 40) -> dict[str, float]:
    x, y = digits[0][:n], digits[1][:n]
    threat = Threat(norm, 0.1 if norm == "linf" else 0.5)
    with frozen(model):
        task = EvaluationTask(PixelModel(model.eval(), threat), Images(x, y), threat, 64,
                              np.ones(n, dtype=bool), 0)
        return fidelity(task, Budget(None, 0.0))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fidelity_is_1_for_the_true_gradient(norm: str, digits: Digits) -> None:
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
    gradient_free = faithful(Around(linear, lambda x: x.detach()), (digits[0], labels), norm)
    assert gradient_free["gradient"] == 0


def test_fidelity_of_a_quantized_model_is_lower_and_shown(
        cnn: nn.Module, quantized: nn.Module, digits: Digits, sound: Evaluation) -> None:
    float_net, steps = faithful(cnn, digits), faithful(quantized, digits)
    assert set(steps) == {"ramp", "sigmoid(8)", "softened k 8", "softened k 2, of itself"}
    assert steps["softened k 2, of itself"] > 0.8 and float_net["gradient"] > 0.8
    assert max(steps[k] for k in ("ramp", "sigmoid(8)", "softened k 8")) < float_net["gradient"]
    assert set(sound.fidelity) == {"gradient"} and "Fidelity" in str(sound)
    assert Evaluation.from_dict(sound.to_dict()).fidelity == sound.fidelity
