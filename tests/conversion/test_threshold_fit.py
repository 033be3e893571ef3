"""Thresholds that fit samples: the step of the smallest squared error, and fixed forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from threshold_search import best, error, normal
from torch import Tensor, nn

from quantguard.conversion.converter import convert
from quantguard.conversion.threshold_fit import mse_step, place
from quantguard.core.specs import QuantSpec
from quantguard.nn.quant_activation import QuantActivation

SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "relu6": lambda x: (4 * x).clamp(0, 6), "gelu": F.gelu, "silu": F.silu,
    "tanh": torch.tanh, "leaky": lambda x: F.leaky_relu(x, 0.2), "identity": lambda x: x,
    "heavy tail": lambda x: x.relu() ** 4, "shifted": lambda x: x - 1.5,
    "negative": lambda x: -x.relu(), "large": lambda x: 1e4 * x.relu(),
    "small": lambda x: 1e-5 * x.relu()}


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_is_the_best_of_a_brute_force_search(shape: str, bits: int) -> None:
    samples, m = SHAPES[shape](normal(1000)), 2**bits - 1
    step, zero = mse_step(samples.unsqueeze(0), m)
    signed = float(samples.min()) < 0
    assert (2 * zero) % 1 == 0 and (signed or zero == 0)
    assert error(samples, float(step), m, zero) <= 1.1 * best(samples, m, None if signed else [0])


def test_a_worse_step_fails_the_brute_force_search() -> None:
    samples = normal(2000).relu()
    step, _ = mse_step(samples.unsqueeze(0), 3)
    for factor in (0.7, 1.4):
        assert error(samples, float(step) * factor, 3, 0) > 1.1 * best(samples, 3, [0])


@pytest.mark.parametrize("function", [nn.Tanh(), nn.LeakyReLU(0.5), nn.ELU(), nn.Hardtanh()])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_signed_activations_get_a_zero_level(function: nn.Module, bits: int) -> None:
    samples = function(normal(4000) * 2)
    step, zero = mse_step(samples.unsqueeze(0), 2**bits - 1)
    assert zero > 0
    module = QuantActivation(QuantSpec(bits), function)
    place(module, samples.unsqueeze(0))
    x = torch.linspace(-4, 4, 101)
    assert float(module(x).detach().min()) < 0 < float(module(x).detach().max())
    assert float(module.zero) == zero and torch.equal(module.step, step[0])


def test_rows_have_steps_of_their_own_and_share_the_zero_level() -> None:
    samples = torch.stack([normal(1500).relu(), 5 * normal(1500, seed=1).relu(),
                           torch.zeros(1500), 0.1 * normal(1500, seed=2).relu()])
    step, zero = mse_step(samples, 7)
    assert zero == 0 and step.shape == (4,) and (step > 0).all()
    for row in (0, 1, 3):
        assert error(samples[row], float(step[row]), 7, 0) <= 1.03 * best(samples[row], 7, [0])


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_placed_thresholds_lie_half_way_between_levels(bits: int, per_channel: bool) -> None:
    module = QuantActivation(QuantSpec(bits, per_channel=per_channel, range_factor=0.5), nn.SiLU())
    samples = F.silu(3 * normal(3 if per_channel else 1, 800))
    place(module, samples)
    m = 2**bits - 1
    full, zero = mse_step(samples, m)
    step = full * 0.5 if per_channel else full[0] * 0.5
    half = torch.arange(m) + 0.5 - zero
    torch.testing.assert_close(module.step, step)
    torch.testing.assert_close(module.thresholds, step.unsqueeze(-1) * half)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.GELU()])
def test_the_tanh_form_is_the_published_formula(activation: nn.Module, bits: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 2))
    module = convert(model, QuantSpec(bits, form="tanh"))[1]
    assert module.thresholds.numel() == 2 ** (bits + 1) - 2
    top = 2**bits - 1
    x = torch.linspace(-4, 4, 3001, dtype=torch.float64)
    scaled = top * torch.tanh(x)
    x = x[((scaled - scaled.floor()) - 0.5).abs() > 1e-4]  # not a tie
    expected = torch.round(top * torch.tanh(x)) / top
    torch.testing.assert_close(module(x.float()), expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_sign_form_is_sign(per_channel: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Hardtanh(), nn.Linear(3, 2))
    module = convert(model, QuantSpec(1, per_channel=per_channel, form="sign"))[1]
    x = torch.tensor([[-2.0, -1e-6, 1e-6], [7.0, -0.1, 0.3]])
    assert torch.equal(module(x), torch.sign(x))
