"""Noise that depends on the image and the seed only, and noise as an attack."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from oracle import Problem, distance
from torch import nn

from quantguard.attacks import FoolboxModel, Noise
from quantguard.attacks.base import fb
from quantguard.attacks.noise import image_noise

Untouched = Callable[[nn.Module], AbstractContextManager[None]]



@pytest.fixture(scope="module", params=["linf", "l2"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_image_noise_does_not_depend_on_the_batch(norm: str) -> None:
    x = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = image_noise(x, norm, 3, "tag")
    order = torch.randperm(9)
    assert torch.equal(image_noise(x[order], norm, 3, "tag"), whole[order])
    assert torch.equal(image_noise(x[4:5], norm, 3, "tag"), whole[4:5])
    assert torch.equal(image_noise(x.to(memory_format=torch.channels_last), norm, 3, "tag"), whole)
    assert torch.equal(image_noise(x.double(), norm, 3, "tag"), whole)
    assert whole.dtype == torch.float32 and whole.shape == x.shape


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_image_noise_depends_on_image_seed_and_tag_only(norm: str) -> None:
    x = torch.rand(2, 1, 4, 4)
    before = torch.get_rng_state()
    first = image_noise(x, norm, 0, "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(image_noise(x, norm, 0, "a"), first)
    changed = x.clone()
    changed[0, 0, 0, 0] += 1e-6
    for other in (image_noise(x, norm, 1, "a"), image_noise(x, norm, 0, "b"),
                  image_noise(changed, norm, 0, "a")):
        assert not torch.equal(other[0], first[0])


def test_image_noise_is_uniform_in_its_ball() -> None:
    x = torch.rand(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    box = image_noise(x, "linf", 0, "t")
    assert box.abs().max() <= 1 and abs(box.mean()) < 0.02 and abs(box.var() - 1 / 3) < 0.01
    radius = image_noise(x, "l2", 0, "t").flatten(1).norm(dim=1)
    # P(radius <= r) = r^d in a ball of d dimensions
    assert radius.max() <= 1 + 1e-6
    for r in (0.5, 0.8, 0.95):
        assert abs((radius <= r).float().mean() - r**4) < 0.03


def test_noise_stays_in_the_ball_and_breaks_some_images(problem: Problem) -> None:
    model = problem.linear()
    attack = Noise(problem.norm, 20)
    found = attack.run(FoolboxModel(model), problem.x, fb.criteria.Misclassification(problem.y),
                       epsilon=problem.eps)
    assert distance(found, problem.x, problem.norm).max() <= problem.eps * (1 + 1e-5)
    fooled = model(found).argmax(1) != problem.y
    assert fooled.any() and not fooled[problem.margin > problem.eps].any()
