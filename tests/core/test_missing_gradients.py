"""Models without a gradient in the images are reported as such, by attacks and training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foolbox.attacks import LinfPGD
from public_calls import THREAT, VERBS, Batches, Wrapped, evaluate, harden
from torch import Tensor, nn

import quantguard as qg

pytestmark = pytest.mark.filterwarnings("ignore")


class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


class Unwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


CUTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a backward of None": lambda net, x: net(Cut.apply(x)),
    "no backward": lambda net, x: net(Unwritten.apply(x)),
    "detach": lambda net, x: net(x.detach()),
    "numpy": lambda net, x: net(torch.from_numpy(x.numpy() * 1)),
    "numbers": lambda net, x: net(torch.tensor(x.tolist())),
    "out": lambda net, x: net(torch.add(x, 0, out=torch.empty_like(x))),
    "no derivative": lambda net, x: net(x + 0 * torch.special.zeta(x + 2, torch.ones(()))),
    "no derivative of steps": lambda net, x: net(torch.floor_divide(x, 0.01) * 0.01),
    "index": lambda net, x: net(torch.linspace(0, 1, 256)[(x * 255).round().long().clamp(0, 255)]),
    "no_grad": torch.no_grad()(lambda net, x: net(x)),
    "inference mode": torch.inference_mode()(lambda net, x: net(x))}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("converted", [
    False, pytest.param(True, marks=pytest.mark.slow)])
def test_without_a_gradient_no_result_is_resolved_and_training_is_refused(
        cut: str, converted: bool, cnn: nn.Module, batches: Batches) -> None:
    model: nn.Module = Wrapped(copy.deepcopy(cnn), CUTS[cut]).eval()
    with pytest.raises(qg.ConversionError, match="cannot be trained"):
        harden(model, batches)
    model = qg.convert(model, data=batches) if converted else model
    found = evaluate(model, batches, "quick")
    # attacks use BPDA for an autograd.Function, but the missing gradient is flagged
    assert found.verdict != "resolved" or found.robust_accuracy == 0
    if found.robust_accuracy > 0:
        assert next(f for f in found.flags if f.name == "zero input gradients").raised


def test_an_operation_without_a_derivative_is_named(cnn: nn.Module, batches: Batches) -> None:
    model = Wrapped(copy.deepcopy(cnn), CUTS["no derivative of steps"]).eval()
    with pytest.warns(UserWarning, match="floor_divide"):
        evaluate(model, batches)
    with pytest.raises(qg.ConversionError, match="floor_divide"):
        harden(model, batches)


def test_foolbox_attacks_see_zeros_where_there_is_no_derivative(cnn: nn.Module,
                                                                batches: Batches) -> None:
    model = Wrapped(copy.deepcopy(cnn), CUTS["no derivative of steps"]).eval()
    for attack in (LinfPGD(steps=2), qg.attacks.DeepFool("linf", 2), qg.attacks.DDN(2)):
        found = qg.evaluate(model, batches, THREAT, suite=[attack], images=8, progress=False)
        assert found.robust_accuracy <= found.clean_accuracy


def test_an_invalid_backward_is_an_error(cnn: nn.Module, batches: Batches) -> None:
    def how(net: nn.Module, x: Tensor) -> Tensor:
        y = net(x).exp()
        product = y * y
        y.add_(1)
        return product
    model = Wrapped(copy.deepcopy(cnn), how).eval()
    for verb in ("evaluate", "harden", "harden clean"):
        with pytest.raises(qg.ConversionError, match="inplace operation"):
            VERBS[verb](model, batches)


def test_a_model_that_starts_constant_is_trained(cnn: nn.Module, batches: Batches) -> None:
    """A head of zeros, with which timm's transformers start, has no gradient in the images."""
    model = copy.deepcopy(cnn)
    head: Any = list(model.modules())[-1]
    nn.init.zeros_(head.weight)
    assert bool(list(harden(model, batches).modules()))


def test_recipe_clean_needs_no_gradient_in_the_images(cnn: nn.Module, batches: Batches) -> None:
    harden(Wrapped(copy.deepcopy(cnn), CUTS["detach"]).eval(), batches, recipe="clean")


def test_weights_that_torch_has_packed_are_refused_by_harden_alone(cnn: nn.Module,
                                                                   batches: Batches) -> None:
    model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(cnn), {nn.Linear})
    assert evaluate(model, batches).verdict != "resolved"
    assert qg.convert(model, data=batches).quantguard.plan.converted  # type: ignore[union-attr]
    with pytest.raises(qg.QuantguardError, match="quantized its weights"):
        harden(model, batches)


def test_weights_that_torchao_has_quantized(cnn: nn.Module, batches: Batches,
                                            tmp_path: Any) -> None:
    import torchao.quantization as ao
    model = copy.deepcopy(cnn)
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    converted = qg.convert(model, data=batches)
    for net in (model, converted):
        assert evaluate(net, batches).images == 16
        with pytest.raises(qg.SpecError, match="of class Int8Tensor(.|\n)*Harden the float model"):
            harden(net, batches)
    with pytest.raises(qg.LoadError, match="of class Int8Tensor"):
        qg.save(converted, tmp_path / "model.qg")
