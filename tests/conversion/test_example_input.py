"""The search for an example input that a model accepts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantguard.conversion.example_input import find_example


class Decides(nn.Module):
    """Model that branches on values, which the meta device does not have."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape))
        return self.net(x) if x.sum() < 1e9 else x


def pooled() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(("net", "shape"), [
    (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 2)), (2, 1, 28, 28)),
    (pooled(), (2, 3, 224, 224)),
    (nn.Sequential(nn.Conv1d(2, 4, 3), nn.AdaptiveAvgPool1d(1)), (2, 2, 1024)),
    (nn.Sequential(nn.Conv3d(3, 4, 3), nn.AdaptiveAvgPool3d(1)), (2, 3, 16, 112, 112)),
    (nn.Linear(7, 2), (2, 7)),
    (nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(16)), (2, 16, 7)),
    (nn.LSTM(6, 4), (2, 16, 6)),
    (nn.Embedding(11, 3), (2, 16)),
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(5, 2)), None),
])
def test_shapes_are_found(net: nn.Module, shape: tuple[int, ...] | None) -> None:
    found = find_example(net)
    assert (None if found is None else tuple(found.shape)) == shape


def test_the_example_does_not_depend_on_the_random_state() -> None:
    before = torch.get_rng_state()
    one = find_example(pooled())
    torch.manual_seed(5)
    assert torch.equal(one, find_example(pooled()))
    torch.set_rng_state(before)


def test_several_inputs_and_other_dtypes() -> None:
    class Two(nn.Linear):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(a + b)

    found = find_example(Two(3, 2).double())
    assert list(found) == ["a", "b"] and found["a"].dtype == torch.float64


def test_a_model_that_must_run_gets_a_strip_and_is_not_changed() -> None:
    net: Any = Decides(pooled())
    assert tuple(find_example(net).shape) == (1, 3, 64, 1344)
    assert net.seen == []


def test_squares_are_tried_if_a_strip_does_not_fit() -> None:
    net = Decides(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 2)))
    assert tuple(find_example(net).shape) == (1, 3, 32, 32)


def test_nothing_runs_on_the_meta_device() -> None:
    net = Decides(pooled()).to("meta")
    assert find_example(net) is None
