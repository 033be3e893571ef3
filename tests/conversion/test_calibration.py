"""Calibration of thresholds from data, BatchNorm statistics and normal inputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from threshold_search import best, error, normal
from torch import Tensor, nn

from quantguard.conversion.apply_plan import apply_plan
from quantguard.conversion.calibration import calibrate
from quantguard.conversion.converter import convert
from quantguard.conversion.planning import make_plan
from quantguard.conversion.threshold_fit import mse_step
from quantguard.core.errors import ConversionError, DataError
from quantguard.nn.quant_activation import quantizers


def with_norm(*after: nn.Module, act: nn.Module | None = None, seed: int = 0) -> nn.Sequential:
    """Return a model whose BatchNorm outputs a different normal in every channel."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(8)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.uniform_(norm.bias, -1.0, 1.0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), norm, *after, act or nn.ReLU(),
                         nn.Conv2d(8, 2, 1)).eval()


def simulated(norms: list[nn.BatchNorm2d], n: int = 2000) -> Tensor:
    """Return the sum of the norms' outputs on data of zero mean and unit variance as (C, n)."""
    total = torch.zeros(8, n)
    for seed, norm in enumerate(norms):
        total += norm.weight.detach().unsqueeze(1) * normal(8, n, seed=seed + 5)
        total += norm.bias.detach().unsqueeze(1)
    return total


@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU(), nn.Hardswish()])
@pytest.mark.parametrize("after", [(), (nn.Dropout(0.3),), (nn.Identity(), nn.Dropout2d(0.3))])
@pytest.mark.parametrize("bits", [2, 4])
def test_batchnorm_statistics_place_thresholds_as_data_would(
        bits: int, after: tuple[nn.Module, ...], act: nn.Module) -> None:
    model = with_norm(*after, act=act)
    module, = quantizers(convert(model, bits)).values()
    samples, m = act(simulated([model[1]])).flatten(), 2**bits - 1
    assert module.zero == mse_step(samples.unsqueeze(0), m)[1]
    found = error(samples, float(module.step), m, module.zero)
    assert found <= 1.1 * best(samples, m, [module.zero])


class Sums(nn.Module):
    def __init__(self, swap: bool) -> None:
        super().__init__()
        self.one, self.other = with_norm(seed=1)[:2], with_norm(seed=2)[:2]
        self.head, self.swap = nn.Conv2d(8, 2, 1), swap
        nn.init.constant_(self.one[1].bias, 3.0)  # so that omitting one makes a difference

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        if self.swap:
            y += self.other(x)
        else:
            y = y + self.other(x)
        return self.head(F.relu(y))


@pytest.mark.parametrize("in_place", [False, True])
def test_statistics_of_added_batchnorms_are_added(in_place: bool) -> None:
    model = Sums(in_place)
    module, = quantizers(convert(model, 3)).values()
    norms = [model.one[1], model.other[1]]
    samples = simulated(norms).relu().flatten()
    assert error(samples, float(module.step), 7, 0) <= 1.05 * best(samples, 7, [0])
    # Negative control: one of them alone gives other steps.
    for norm in norms:
        alone, _ = mse_step(simulated([norm]).relu().reshape(1, -1), 7)
        assert abs(float(alone) / float(module.step) - 1) > 0.1


def test_batchnorm_statistics_per_channel() -> None:
    model = with_norm()
    module, = quantizers(convert(model, 3, per_channel=True)).values()
    samples = simulated([model[1]], 3000).relu()
    assert module.thresholds.shape == (8, 7)
    for row in range(8):
        found = error(samples[row], float(module.step[row]), 7, 0)
        assert found <= 1.1 * best(samples[row], 7, [0])
    assert float(module.step.max() / module.step.min()) > 1.5


def test_a_batchnorm_without_weights_outputs_a_unit_normal() -> None:
    model = with_norm()
    model[1] = nn.BatchNorm2d(8, affine=False)
    module, = quantizers(convert(model, 2)).values()
    samples = normal(20_000).relu()
    assert error(samples, float(module.step), 3, 0) <= 1.03 * best(samples, 3, [0])


def mlp(act: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), act or nn.ReLU(), nn.Linear(16, 3))


class Loader:
    """Re-iterable of batches."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU()])
@pytest.mark.parametrize("per_channel", [False, True])
def test_data_places_thresholds_where_the_activations_are(act: nn.Module,
                                                          per_channel: bool) -> None:
    model = mlp(act)
    x = 3 * normal(300, 6) + 1
    labels = torch.zeros(100, dtype=torch.long)
    data = Loader((x[:100], labels), (x[100:200], labels), (x[200:], labels))
    module = convert(model, 3, data=data, per_channel=per_channel)[1]
    with torch.no_grad():
        values = act(model[0](x))
    for row in range(16 if per_channel else 1):
        samples = values[:, row] if per_channel else values
        found = error(samples, float(module.step.reshape(-1)[row]), 7, module.zero)
        assert found <= 1.03 * best(samples, 7, [module.zero])


def test_data_of_another_scale_moves_the_thresholds_with_it() -> None:
    model = mlp()
    nn.init.zeros_(model[0].bias)
    x = normal(200, 6)
    one, ten = (convert(model, 3, data=[x * scale])[1] for scale in (1.0, 10.0))
    torch.testing.assert_close(ten.thresholds, 10 * one.thresholds, rtol=1e-3, atol=0)


def test_data_is_used_in_eval_mode_and_before_statistics() -> None:
    model = with_norm(nn.Dropout(0.9)).train()
    model[1].running_var.fill_(1e-4)
    x = normal(4, 3, 8, 8)
    module, = quantizers(convert(model, 3, data=[x])).values()
    with torch.no_grad():
        values = model.eval()[:4](x).flatten()
    assert error(values, float(module.step), 7, 0) <= 1.03 * best(values, 7, [0])


def test_normal_inputs_place_thresholds_for_a_unit_normal() -> None:
    model = mlp()
    module = convert(model, 3)[1]
    with torch.no_grad():
        values = model[1](model[0](normal(8, 6)))
    assert error(values, float(module.step), 7, 0) <= 1.03 * best(values, 7, [0])


def test_normal_inputs_are_normalised_by_their_own_statistics() -> None:
    found, model = [], with_norm(nn.Conv2d(8, 8, 1), act=nn.GELU())
    for mean, variance in ((0.0, 1.0), (50.0, 1e-4)):
        model[1].running_mean.fill_(mean)
        model[1].running_var.fill_(variance)
        found.append(convert(model, 3)[3].thresholds)
    assert torch.equal(*found)


@pytest.mark.parametrize(("fits_half", "shapes"), [
    (True, [(1, 3, 56, 64)]), (False, [(1, 3, 56, 64), (2, 3, 112, 128)])])
def test_large_normal_inputs_have_half_the_size_if_the_model_accepts_it(
        fits_half: bool, shapes: list[tuple[int, ...]]) -> None:
    head = nn.AdaptiveAvgPool2d(2) if fits_half else nn.Identity()
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.GELU(), nn.Conv2d(2, 2, 1),
                          nn.GELU(), head, nn.Flatten(),
                          nn.Linear(8 if fits_half else 2 * 110 * 126, 2))
    example = torch.zeros(1, 3, 112, 128)
    plan = make_plan(model, 3, example=example)
    converted = apply_plan(model, plan)
    seen = []
    converted[0].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    calibrate(converted, plan.converted, None, example)
    assert seen == shapes
    with torch.no_grad():
        model[1].train()
        values = model[:5](normal(2, 3, 112, 128))
    module = converted[4]
    assert error(values, float(module.step), 7, module.zero) <= 1.1 * best(
        values, 7, [module.zero])


def test_channels_with_few_values_are_placed_together() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 6, 1),
                          nn.ReLU(), nn.Conv2d(6, 2, 1))
    few = convert(model, 2, data=[normal(8, 3, 9, 9)], per_channel=True)[3]
    many = convert(model, 2, data=[normal(64, 3, 9, 9)], per_channel=True)[3]
    assert few.step.shape == many.step.shape == (6,)
    assert few.step.unique().numel() == 1 < many.step.unique().numel()


def test_normal_inputs_do_not_depend_on_random_state_and_modes() -> None:
    found = []
    for seed in (0, 1):
        model = nn.Sequential(nn.Dropout(0.5), *mlp()).train(seed == 0)
        torch.manual_seed(seed)
        found.append(convert(model, 3)[2].thresholds)
    assert torch.equal(*found)


def test_normal_inputs_are_reproducible_through_dropout() -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(5)
        model = Auxiliary(0.5)
        torch.manual_seed(seed)
        found.append(convert(model, 3).gelu.thresholds)
    assert torch.equal(*found)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("data", [None, [normal(4, 3, 8, 8)]])
def test_calibration_does_not_change_buffers_modes_and_random_state(data: Any,
                                                                  training: bool) -> None:
    # Only normal inputs can calibrate the GELU: no BatchNorm precedes it.
    model = nn.Sequential(*with_norm(), nn.GELU(), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
    model.train(training)
    expected = copy.deepcopy(model)
    random = torch.get_rng_state()
    converted = convert(model, 2, True, data=data)
    assert torch.equal(torch.get_rng_state(), random)
    for net in (model, converted):
        state = net.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in expected.state_dict().items())
        assert {m.training for m in net.modules()} == {training}
        assert all(p.grad is None for p in net.parameters())


class Auxiliary(nn.Module):
    """Model with one more activation in training."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.stem, self.head, self.drop = nn.Linear(6, 8), nn.Linear(8, 3), nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(x + F.gelu(5 * self.drop(x))) if self.training else self.head(x)


@pytest.mark.parametrize("data", [None, [normal(64, 6)]])
def test_activations_that_run_in_training_only_use_normal_inputs(data: Any) -> None:
    model = Auxiliary()
    gelu = quantizers(convert(model, 3, data=data))["gelu"]
    with torch.no_grad():
        values = F.gelu(5 * F.relu(model.stem(normal(8, 6))))
    assert 0.5 < error(values, float(gelu.step), 7, gelu.zero) / best(
        values, 7, [gelu.zero]) < 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_window_at_one_bit_is_the_step(dynamic: bool) -> None:
    module = convert(mlp(), 1, dynamic)[1]
    assert torch.equal(module.base_width, module.step)
    assert module.thresholds.tolist() == [pytest.approx(float(module.base_step) / 2)]


def test_a_dead_activation_still_gets_thresholds() -> None:
    model = mlp()
    nn.init.constant_(model[0].bias, -1e6)
    module = convert(model, 2, data=[normal(10, 6)])[1]
    assert float(module.step) > 0 and not module(torch.full((3,), -5.0)).any()


def test_activations_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(DataError, match="batch 0 of data holds NaN"):
        convert(mlp(), data=[torch.full((2, 6), torch.nan)])
    model = mlp()
    nn.init.constant_(model[0].weight, 3e38)
    with pytest.raises(DataError, match="'1' outputs NaN or infinity"):
        convert(model, data=[torch.full((2, 6), 9.0)])


def test_the_error_without_any_known_input_names_the_arguments_to_pass() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.layer(x.reshape(-1, 2, 3, 7).sum(-1).flatten(1))))

    with pytest.raises(ConversionError, match="no thresholds for relu"):
        convert(Strange())
    for options in ({"example": normal(2, 42)}, {"data": [normal(2, 42)]}):
        assert float(convert(Strange(), **options).relu.step) > 0  # type: ignore[arg-type]
