"""Minimum-norm attacks by gradients: Carlini & Wagner, DDN and DeepFool."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import foolbox as fb
import pytest
from boundary_oracle import GRADIENT, found, name, problem_of
from torch import Tensor, nn

Untouched = Callable[[nn.Module], AbstractContextManager[None]]



@pytest.mark.parametrize("attack", GRADIENT[:2] + GRADIENT[2:3], ids=name)
def test_the_oracle_rejects_a_gradient_of_the_wrong_sign(attack: Any) -> None:
    class Flipped(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.model(x)
            return 2 * logits.detach() - logits

    problem = problem_of(attack)
    result = found(attack, Flipped(problem.linear()).eval(), problem.x, problem.y)
    fooled = problem.linear()(result).argmax(1) != problem.y
    assert fooled.float().mean() < 0.5


@pytest.mark.parametrize(("attack", "plain"), list(zip(GRADIENT, [
    fb.attacks.L2CarliniWagnerAttack(2, 20), fb.attacks.DDNAttack(steps=20),
    fb.attacks.L2DeepFoolAttack(), fb.attacks.LinfDeepFoolAttack()], strict=True)), ids=name)
def test_no_gradient_is_left_on_parameters_and_no_random_number_drawn(
        attack: Any, plain: Any, untouched: Untouched) -> None:
    problem = problem_of(attack, 12)
    model = problem.linear()
    plain.run(fb.PyTorchModel(model, (0, 1), device="cpu"), problem.x,
              fb.criteria.Misclassification(problem.y))
    assert model[1].weight.grad is not None
    model = problem.linear()
    with untouched(model):
        found(attack, model, problem.x, problem.y)
    assert model[1].weight.grad is None
