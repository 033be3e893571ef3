"""Losses, steepest ascent and projection."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from oracle import distance
from torch import nn

from quantguard.attacks.losses import ascend, attack_loss, dlr, image_losses, margin, project, rival

Untouched = Callable[[nn.Module], AbstractContextManager[None]]



def test_targets_are_ranked_among_the_wrong_classes() -> None:
    logits = torch.tensor([[5.0, 1.0, 3.0, 2.0], [0.0, 1.0, 3.0, 2.0]])
    labels = torch.tensor([0, 2])
    assert [rival(logits, labels, k).tolist() for k in (1, 2, 3, 9)] == [
        [2, 3], [3, 1], [1, 0], [1, 0]]
    loss = attack_loss(logits, labels, "margin", torch.tensor([3, 0]))
    assert float(loss) == (2 - 5) + (0 - 3)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
def test_the_scaled_loss_is_invariant_to_scale(scale: float) -> None:
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.zeros(20, dtype=torch.long)
    gradients = [torch.autograd.grad(attack_loss(s * logits, labels, "scaled"), logits)[0]
                 for s in (1.0, scale)]
    torch.testing.assert_close(*gradients)
    huge = torch.autograd.grad(attack_loss(1e3 * logits, labels, "ce"), logits)[0]
    assert (huge == 0).flatten(1).all(1).any()  # which cross-entropy does


def test_margin_is_positive_exactly_where_misclassified() -> None:
    z = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    y = torch.arange(200) % 7
    assert torch.equal(margin(z, y) > 0, z.argmax(1) != y)
    assert margin(torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([1])).item() == -2.0


def test_dlr_is_the_papers() -> None:
    z, y = torch.tensor([[1.0, 5.0, 3.0, 2.0], [4.0, 0.0, 1.0, 2.0]]), torch.tensor([1, 3])
    assert dlr(z, y).tolist() == pytest.approx([-2 / 3, 2 / 3])
    assert dlr(z, y, torch.tensor([2, 0])).tolist() == pytest.approx([-2 / 3.5, 2 / 3.5])
    assert image_losses(z, y, "dlr").tolist() == dlr(z, y).tolist()


@pytest.mark.parametrize("classes", [2, 3, 4, 9])
@pytest.mark.parametrize("aimed", [False, True])
def test_dlr_is_positive_where_misclassified_and_has_a_gradient(classes: int, aimed: bool) -> None:
    z = torch.randn(300, classes, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.arange(300) % classes
    target = (y + 1 + torch.arange(300) // classes % (classes - 1)) % classes if aimed else None
    value = dlr(z, y, target)
    assert torch.equal(value > 0, margin(z, y, target) > 0)
    if classes > 2:
        torch.testing.assert_close(dlr(50 * z + 7, y, target), value, atol=1e-3, rtol=1e-3)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    ahead = z.detach().amax(1) == z.detach().gather(1, y[:, None])[:, 0]
    # behind already, nothing need pull; a right answer must never lie flat
    assert (gradient[ahead].abs().amax(1) > 1e-3).all()


def test_equal_logits_are_no_division_by_zero() -> None:
    for classes in (2, 3, 5):
        z = torch.zeros(2, classes, requires_grad=True)
        value = dlr(z, torch.tensor([0, 1]))
        (gradient,) = torch.autograd.grad(value.sum(), z)
        assert (value == 0).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("scale", [1e3, 1.0, 1e-9, 1e-20])
def test_the_steepest_direction_has_unit_length_however_small_the_gradient(scale: float) -> None:
    g = torch.randn(5, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    flat = torch.zeros(1, 1, 3, 3)
    for norm in ("linf", "l2"):
        steps = ascend(torch.cat([g * scale, flat]), norm)
        expected = g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert torch.allclose(steps[:5], expected, atol=1e-5)
        assert torch.equal(steps[5:], flat)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_project_changes_only_points_outside_the_ball(norm: str) -> None:
    g = torch.Generator().manual_seed(0)
    center = torch.rand(50, 1, 4, 4, generator=g)
    near = center + 1e-3 * torch.randn(center.shape, generator=g)
    far = center + torch.randn(center.shape, generator=g)
    eps = 0.1
    assert torch.allclose(project(near, center, eps, norm, (-9, 9)), near, atol=1e-6)
    shorter = project(far, center, eps, norm, (-9, 9))
    assert torch.allclose(distance(shorter, center, norm), torch.full((50,), eps), rtol=1e-4)
    legal = project(far, center, eps, norm, (0, 1))
    assert legal.min() >= 0 and legal.max() <= 1
    assert (distance(legal, center, norm) <= eps * (1 + 1e-5)).all()
    assert torch.equal(project(center, center, 0.0, norm, (0, 1)), center)
