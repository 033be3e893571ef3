"""The input gradient of convolutions of few channels, compared with autograd's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantguard import Threat, convert
from quantguard.attacks import PixelModel
from quantguard.attacks.losses import input_gradient
from quantguard.nn import conv_input_grad
from quantguard.nn.conv_input_grad import ConvInputGrad

Layer = Callable[[Tensor], Tensor]


def taken(y: Tensor) -> bool:
    return y.grad_fn is not None and "_FewChannelConv" in str(y.grad_fn)


def gradients(layer: Layer, x: Tensor, others: list[Tensor], fast: bool) -> list[Tensor]:
    if not fast:
        y = layer(x)
    else:
        with ConvInputGrad():
            y = layer(x)
    assert taken(y) is fast
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, [x, *others], torch.randn_like(y))]


@pytest.mark.parametrize(("channels", "kernel"), [*itertools.product((1, 3, 4), (1, 3, (2, 5)))])
def test_gradients_are_those_of_autograd(channels: int, kernel: Any) -> None:
    for stride, padding, dilation, layout in itertools.product(
            (1, 2, (3, 1)), (0, 1, (2, 0)), (1, (1, 2)),
            (torch.contiguous_format, torch.channels_last)):
        layer = nn.Conv2d(channels, 5, kernel, stride, padding, dilation).double()
        layer = layer.to(memory_format=layout)  # type: ignore[call-overload]
        x = torch.rand(3, channels, 11, 13, dtype=torch.float64, requires_grad=True)
        others = [*layer.parameters()]
        for a, b in zip(gradients(layer, x, others, False), gradients(layer, x, others, True),
                        strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_second_derivative_is_right() -> None:
    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with ConvInputGrad():
            return torch.conv2d(x, weight, bias, 2, 1)
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True)
             for shape in ((2, 1, 5, 5), (2, 1, 3, 3), (2,))]
    assert torch.autograd.gradcheck(layer, tensors)
    assert torch.autograd.gradgradcheck(layer, tensors)


def test_a_batch_in_several_parts_has_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1)
    x = torch.rand(7, 3, 9, 9, requires_grad=True)
    whole = gradients(layer, x, [], True)[1]
    monkeypatch.setattr(conv_input_grad, "_PRODUCT_BYTES", 3 * 27 * 81 * 4)
    torch.testing.assert_close(gradients(layer, x, [], True)[1], whole)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_low_precision_is_no_worse_than_autograds(kind: torch.dtype) -> None:
    layer = nn.Conv2d(1, 16, 5, padding=2)
    x = torch.rand(8, 1, 28, 28, requires_grad=True)
    exact = gradients(layer.double(), x.detach().double().requires_grad_(), [], False)[1]
    layer, near = layer.to(kind), x.detach().to(kind).requires_grad_()
    own, fast = (gradients(layer, near, [], way)[1].double() for way in (False, True))
    assert (fast - exact).abs().max() < 1.5 * (own - exact).abs().max() + 1e-5


def test_autocast_casts_as_without_it() -> None:
    layer, x = nn.Conv2d(1, 4, 3), torch.rand(2, 1, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x)
        with ConvInputGrad():
            fast = layer(x)
    assert taken(fast) and fast.dtype == plain.dtype == torch.bfloat16 and torch.equal(plain, fast)
    (gradient,) = torch.autograd.grad(fast.sum(), x)
    assert gradient.dtype == torch.float32


def other_layers() -> dict[str, tuple[Layer, Tensor]]:
    image = torch.rand(2, 3, 8, 8, requires_grad=True)
    return {"groups": (nn.Conv2d(3, 6, 3, groups=3), image),
            "many channels": (nn.Conv2d(5, 6, 3), torch.rand(2, 5, 8, 8, requires_grad=True)),
            "no gradient": (nn.Conv2d(3, 6, 3), image.detach()),
            "one image without a batch": (nn.Conv2d(3, 6, 3), image[0].detach().requires_grad_()),
            "padding by name": (nn.Conv2d(3, 6, 3, padding="same"), image)}


@pytest.mark.parametrize("name", [*other_layers()])
def test_other_layers_are_left_alone(name: str) -> None:
    layer, x = other_layers()[name]
    with ConvInputGrad():
        y = layer(x)
    assert not taken(y) and torch.equal(y, layer(x))
    with ConvInputGrad(), pytest.raises(RuntimeError):
        nn.Conv2d(3, 6, 3)(torch.rand(2, 1, 8, 8, requires_grad=True))
    with ConvInputGrad(), pytest.raises(RuntimeError):  # types that differ are not cast
        nn.Conv2d(3, 6, 3).to(torch.bfloat16)(torch.rand(2, 3, 8, 8, requires_grad=True))


@pytest.mark.parametrize("bits", [None, 2])
def test_attacks_use_it_and_get_the_same_gradient(
        bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(8 * 49, 10)).eval()
    if bits:
        net = convert(net, bits, data=[torch.rand(16, 1, 14, 14)])
    x, labels = torch.rand(6, 1, 14, 14), torch.arange(6)
    model, used = PixelModel(net, Threat(eps=0.1)), []
    original = conv_input_grad._FewChannelConv.apply
    monkeypatch.setattr(conv_input_grad._FewChannelConv, "apply",
                        lambda *args: used.append(1) or original(*args))
    fast, _ = input_gradient(model, x, labels, "margin")
    assert used
    monkeypatch.setattr(conv_input_grad, "_MAX_CHANNELS", 0)
    slow, _ = input_gradient(model, x, labels, "margin")
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)
    assert F.cosine_similarity(fast.flatten(), slow.flatten(), 0) > 0.9999
    compiled = PixelModel(torch.compile(net, backend="eager"), Threat(eps=0.1))  # type: ignore[arg-type]
    monkeypatch.undo()
    torch.testing.assert_close(input_gradient(compiled, x, labels, "margin")[0], slow)
