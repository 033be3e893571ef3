"""Other people's quantizers are found with their thresholds, however written, and softened."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantizer_spellings import FORMS, LEVELS, Quantizing, T
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

import quantguard as qg
from quantguard.attacks import PGD, FoolboxModel
from quantguard.attacks.base import fb
from quantguard.attacks.losses import input_gradient
from quantguard.attacks.pixel_model import PixelModel
from quantguard.attacks.step_sites import find_sites
from quantguard.core.runtime import measuring


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def with_sites(model: nn.Module, images: Tensor) -> PixelModel:
    wrapped = PixelModel(model.eval(), qg.Threat(eps=0.1))
    with measuring(wrapped, 0):
        wrapped.find_step_functions(images)
    return wrapped


@pytest.mark.parametrize("name", FORMS)
def test_every_spelling_is_found_with_its_thresholds(name: str, images: Tensor) -> None:
    sites = with_sites(Quantizing(FORMS[name]), images).sites
    assert len(sites) == 3
    for site in sites:
        assert torch.allclose(site.steps.thresholds, T, atol=2e-3)
        assert torch.allclose(site.steps.jumps, torch.full((3,), 0.5), atol=1e-3)
        assert torch.allclose(site.steps.base, torch.zeros(()), atol=1e-3)


def ours(thresholds: Tensor = T, step: float = 0.5) -> nn.Module:
    return Quantizing(*(qg.QuantActivation.from_thresholds(thresholds, step) for _ in range(3)))


@pytest.mark.parametrize("name", FORMS)
def test_its_softened_gradient_is_that_of_our_own_quantizer(name: str, images: Tensor) -> None:
    labels = torch.arange(len(images)) % 4

    def gradient(model: nn.Module) -> Tensor:
        wrapped = with_sites(model, images)
        attack = PGD("ce", 1, sharpness=(4, 4))
        with measuring(wrapped, 0), attack._surrogate(wrapped, 0.0):
            return input_gradient(wrapped, images, labels, "ce")[0]
    expected, found = gradient(ours()), gradient(Quantizing(FORMS[name]))
    assert torch.nn.functional.cosine_similarity(
        expected.flatten(1), found.flatten(1)).min() > 0.999


@pytest.mark.parametrize("name", FORMS)
def test_its_surrogate_gradient_is_that_of_our_own_quantizer(
        name: str, images: Tensor) -> None:
    """Values stay. Without it the robustness of a 1-bit net was 2 points too high."""
    labels = torch.arange(len(images)) % 4

    def taken(model: nn.Module) -> tuple[Tensor, Tensor]:
        wrapped = with_sites(model, images)
        attack = PGD("ce", 1, mode="sigmoid(8)")
        with measuring(wrapped, 0), attack._surrogate(wrapped, 0.0):
            return (input_gradient(wrapped, images, labels, "ce")[0],
                    wrapped(images.clone().requires_grad_()).detach())
    (expected, logits), (found, same) = taken(ours()), taken(Quantizing(FORMS[name]))
    torch.testing.assert_close(same, logits)
    assert torch.nn.functional.cosine_similarity(
        expected.flatten(1), found.flatten(1)).min() > 0.999


class Table(nn.Module):
    """Lookup table with a straight-through estimator."""

    def __init__(self, thresholds: list[float], levels: list[float]) -> None:
        super().__init__()
        self.t, self.levels = torch.tensor(thresholds), torch.tensor(levels)

    def forward(self, z: Tensor) -> Tensor:
        return z + (self.levels[torch.bucketize(z.detach(), self.t)] - z).detach()


@pytest.mark.parametrize(("thresholds", "levels"), [
    ([0.6], [0.0, 1.0]), ([0.0], [-1.0, 1.0]), ([-0.2], [-0.5, 0.5]),
    ([0.1, 0.3, 1.0], [0.0, 0.2, 0.6, 1.5]), ([-0.5, 0.1, 0.9], [0.0, 1.0, 0.2, 1.5]),
    ([i / 8 for i in range(1, 8)], [i / 4 for i in range(8)]),
    ([i / 16 for i in range(1, 16)], [i / 8 for i in range(16)]),
    (sorted([*(2.0**-i for i in range(1, 7)), 0.7]), [0.0, *(2.0**-i for i in range(6, 0, -1)), 1.5]
     )])
def test_one_to_four_bits_and_uneven_steps(thresholds: list[float], levels: list[float],
                                           images: Tensor) -> None:
    sites = with_sites(Quantizing(Table(thresholds, levels)), images).sites
    assert len(sites) == 3
    for site in sites:
        t, jumps = site.steps.thresholds, site.steps.jumps
        assert t.shape == (len(thresholds),) and torch.allclose(
            t, torch.tensor(thresholds), atol=3e-3)
        assert torch.allclose(jumps, torch.tensor(levels).diff(), atol=1e-3)


class PerChannel(nn.Module):
    """Quantizer with thresholds and step for each channel."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        count = max(shape)
        generator = torch.Generator().manual_seed(count)
        self.shape, self.step = shape, 0.3 + torch.rand(count, generator=generator) / 2
        self.t = torch.rand(3, count, generator=generator) / 3 + torch.arange(3)[:, None] * 0.5

    def forward(self, z: Tensor) -> Tensor:
        count = sum((z > t.reshape(self.shape)).float() for t in self.t)
        return (count * self.step.reshape(self.shape)).detach() + 0 * z


def test_channels_have_thresholds_of_their_own(images: Tensor) -> None:
    quantizers = [PerChannel((1, 8, 1, 1)), PerChannel((1, 8, 1, 1)), PerChannel((1, 16))]
    wrapped = with_sites(Quantizing(*quantizers), images)
    assert [s.steps.axis for s in wrapped.sites] == [1, 1, 1]
    for site, quantizer in zip(wrapped.sites, quantizers, strict=True):
        # The source may be in front of a BatchNorm, so compare jumps, of channels with all three.
        jumps = site.steps.jumps
        whole = (jumps > 0).sum(1) == 3
        assert whole.any()
        assert torch.allclose(jumps[whole], quantizer.step[whole, None].expand(-1, 3), atol=1e-3)


@pytest.mark.parametrize("f", [
    torch.relu, nn.functional.gelu, nn.functional.relu6, nn.functional.hardtanh, torch.sigmoid,
    nn.functional.dropout, lambda z: z * (z > 0), lambda z: z.abs()])
def test_other_functions_are_not_found(f: Callable[[Tensor], Tensor], images: Tensor) -> None:
    assert with_sites(Quantizing(f), images).sites == ()


class OfANeighbour(torch.autograd.Function):
    """Not elementwise: the level of each value is that of its neighbour."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return FORMS["round"](z.roll(1, 0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def test_a_step_function_of_other_elements_is_not_found(images: Tensor) -> None:
    assert with_sites(Quantizing(lambda z: OfANeighbour.apply(z)), images).sites == ()


class Refusing(nn.Module):
    """Raises after some calls, as an assertion on the range of its input might."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 9:  # three layers: one recorded and two replaced forwards
            raise ValueError("out of the table")
        return FORMS["Function"](z)


def test_samples_before_a_failing_forward_are_used(images: Tensor) -> None:
    model, touchy = Quantizing(FORMS["Function"]).eval(), Refusing()
    model.quantizers = (touchy,) * 3
    wrapped = PixelModel(model, qg.Threat(eps=0.1))
    with measuring(wrapped, 0):
        sites = find_sites(wrapped, images + torch.rand(images.shape) / 100, model)
    assert touchy.calls == 10 and len(sites) == 3
    assert all(torch.allclose(s.steps.thresholds, T, atol=0.05) for s in sites)


def test_our_own_quantizers_are_not_found(images: Tensor) -> None:
    wrapped = with_sites(ours(), images)
    assert wrapped.sites == () and wrapped.softenable is False


def test_quantizers_behind_quantized_weights_are_found(images: Tensor) -> None:
    model = Quantizing(FORMS["Function"])
    for layer in (model.first, model.second, model.hidden):
        scale = layer.weight.data.abs().max() / 7
        layer.weight.data = (layer.weight.data / scale).round() * scale
        layer.bias.data = (layer.bias.data / 0.05).round() * 0.05  # type: ignore[operator]
    assert len(with_sites(model, images).sites) == 3


def test_fake_quantize_modules_are_found_and_not_updated(images: Tensor) -> None:
    model = Quantizing(*(nn.Sequential(nn.ReLU(), FakeQuantize(MovingAverageMinMaxObserver, 0, 3))
                         for _ in range(3)))
    model.train()
    for _ in range(5):
        model(images)
    before = copy.deepcopy(model.eval().state_dict())  # observers are still on
    wrapped = with_sites(model, images)
    assert len(wrapped.sites) == 3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for site, module in zip(wrapped.sites, model.quantizer_modules, strict=True):  # type: Any
        scale = float(module[1].scale)
        assert torch.allclose(site.steps.jumps, torch.tensor(scale), rtol=1e-3)


@pytest.mark.parametrize("name", ["Function", "misleading Function", "fake_quantize", "detach"])
def test_as_many_images_are_broken_as_with_our_own_quantizer(name: str, images: Tensor) -> None:
    def broken(model: nn.Module) -> int:
        wrapped = FoolboxModel(model.eval())
        labels = wrapped.module(images).argmax(1)
        found = PGD("margin", 20, sharpness=(2, 32)).run(
            wrapped, images, fb.criteria.Misclassification(labels), epsilon=0.06)
        return int((wrapped.module(found).argmax(1) != labels).sum())
    expected = broken(ours())
    assert expected > 10 and abs(broken(Quantizing(FORMS[name])) - expected) <= 2


class CallsVary(nn.Module):
    """Makes one more call without a gradient, which shifts the numbers of calls."""

    def forward(self, z: Tensor) -> Tensor:
        if not z.requires_grad:
            z = z + 0
        return FORMS["Function"](z)


def test_a_varying_number_of_calls_is_no_error(images: Tensor) -> None:
    model = FoolboxModel(Quantizing(CallsVary()).eval())
    labels = model.module(images).argmax(1)
    found = PGD("ce", 3, sharpness=(2, 8)).run(model, images, fb.criteria.Misclassification(labels),
                                          epsilon=0.05)
    assert (found - images).abs().max() <= 0.05 + 1e-6


def test_the_table_has_the_expected_levels(images: Tensor) -> None:
    assert torch.equal(LEVELS[torch.bucketize(torch.tensor([0.2, 0.3]), T)],
                       torch.tensor([0.0, 0.5]))


def test_a_source_that_is_overwritten_later_is_softened_before(images: Tensor) -> None:
    class Overwrites(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            q: Any = FORMS["fake_quantize"](z)
            z.detach().zero_()
            return q  # type: ignore[no-any-return]
    labels = torch.arange(len(images)) % 4
    gradients = []
    for model in (ours(), Quantizing(Overwrites())):
        wrapped = with_sites(model, images)
        with measuring(wrapped, 0), PGD("ce", 1, sharpness=(4, 4))._surrogate(wrapped, 0.0):
            gradients.append(input_gradient(wrapped, images, labels, "ce")[0].flatten(1))
    assert torch.nn.functional.cosine_similarity(*gradients).min() > 0.999
