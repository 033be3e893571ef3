"""Activation modules, functions and methods, in place and not, as quantized activations."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rewritten_models import Calls, X, assert_converted, same_gradients
from torch import Tensor, nn

from quantguard.conversion.converter import conversion_of, convert, restore
from quantguard.nn.quant_activation import QuantActivation, quantizers

MODULES = [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.3), nn.GELU("tanh"), nn.SiLU(), nn.Hardswish(),
           nn.Tanh()]
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "F.relu": lambda self, x: F.relu(x), "torch.relu": lambda self, x: torch.relu(x),
    "method": lambda self, x: x.relu(), "keyword": lambda self, x: F.relu(input=x),
    "relu6": lambda self, x: F.relu6(x), "leaky": lambda self, x: F.leaky_relu(x, 0.3),
    "gelu": lambda self, x: F.gelu(x, approximate="tanh"), "silu": lambda self, x: F.silu(x),
    "hardswish": lambda self, x: F.hardswish(x), "tanh": lambda self, x: torch.tanh(x),
    "tanh method": lambda self, x: x.tanh(),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("act", MODULES, ids=lambda m: type(m).__name__)
def test_activation_modules(act: nn.Module, dynamic: bool) -> None:
    model = Calls(lambda self, x: self.act(x), act)
    converted = convert(model, 2, dynamic)
    assert_converted(model, converted)
    quantizer = converted.act
    assert isinstance(quantizer, QuantActivation) and quantizer.spec.dynamic is dynamic
    hidden = act(model.first(X))
    count = (hidden.unsqueeze(-1) > quantizer.thresholds).sum(-1)
    assert torch.equal(converted(X), model.last(quantizer.step * (count - quantizer.zero)))
    assert same_gradients(model, converted)


@pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)
def test_activation_functions_and_methods(call: Callable[..., Tensor]) -> None:
    model = Calls(call)
    converted = convert(model)
    assert_converted(model, converted)
    quantizer, = quantizers(converted).values()
    hidden = call(model, model.first(X))
    count = (hidden.unsqueeze(-1) > quantizer.thresholds).sum(-1)
    assert torch.equal(converted(X), model.last(quantizer.step * (count - quantizer.zero)))
    assert same_gradients(model, converted)
    assert torch.equal(restore(converted)(X), model(X))


# Name: (in-place form, the same computation with quantizer q and without in-place calls).
IN_PLACE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "relu_": (lambda self, x: F.relu_(x) + 2 * x, lambda q, x: 3 * q(x)),
    "inplace=True": (lambda self, x: F.relu(x, inplace=True) * x, lambda q, x: q(x) * q(x)),
    "method": (lambda self, x: x.relu_() + 2 * x, lambda q, x: 3 * q(x)),
    "result unused": (lambda self, x: (x.relu_(), 2 * x)[1], lambda q, x: 2 * q(x)),
    "module": (lambda self, x: self.act(x) + 2 * x, lambda q, x: 3 * q(x)),
    "slice": (lambda self, x: x + F.relu_(x[:, :3]).sum(),
              lambda q, x: torch.cat([q(x[:, :3]), x[:, 3:]], 1) + q(x[:, :3]).sum()),
    "view": (lambda self, x: x + F.relu_(x.view(-1)).sum(), lambda q, x: q(x) + q(x).sum()),
    "leaky": (lambda self, x: F.leaky_relu(x, 0.3, True) + 2 * x, lambda q, x: 3 * q(x)),
    "silu": (lambda self, x: F.silu(x, inplace=True) + 2 * x, lambda q, x: 3 * q(x)),
    "hardswish": (lambda self, x: F.hardswish(x, inplace=True) + 2 * x, lambda q, x: 3 * q(x)),
    "tanh_": (lambda self, x: x.tanh_() + 2 * x, lambda q, x: 3 * q(x)),
    "read before": (lambda self, x: torch.cat([x * 1, F.relu_(x)], 1)[:, 3:9],
                    lambda q, x: torch.cat([x, q(x)], 1)[:, 3:9]),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", IN_PLACE)
def test_an_overwritten_tensor_that_is_read_later_has_the_quantized_value(
        name: str, dynamic: bool) -> None:
    call, meaning = IN_PLACE[name]
    model = Calls(call, nn.ReLU(inplace=True) if name == "module" else None)
    converted = convert(model, 2, dynamic)
    assert_converted(model, converted)
    quantizer, = quantizers(converted).values()
    alone = copy.deepcopy(quantizer)
    alone.inplace = False
    expected = model.last(meaning(alone, model.first(X)))
    torch.testing.assert_close(converted(X), expected, rtol=0, atol=1e-6)
    assert same_gradients(model, converted)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Hardswish, nn.LeakyReLU])
def test_an_in_place_module_writes_into_its_callers_tensor(act: type[nn.Module]) -> None:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
            self.body = nn.Sequential(act(inplace=True), nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.body(x)
            return self.head(x + y)

    model = PreActivation()
    converted = convert(model)
    assert_converted(model, converted)
    alone = copy.deepcopy(converted.body[0])
    alone.inplace = False
    hidden = alone(model.stem(X))
    assert torch.equal(converted(X), model.head(hidden + model.body[1](hidden)))
    assert same_gradients(model, converted)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(x) * torch.sigmoid(self.layer(x)))


@pytest.mark.parametrize("gates", [False, True])
def test_gates_stay_float_unless_requested(gates: bool) -> None:
    model = nn.Sequential(Gated(), nn.Sigmoid())
    converted = convert(model, gates=gates)
    assert_converted(model, converted)
    assert set(quantizers(converted)) == {"0.relu"} | ({"0.sigmoid"} if gates else set())
    assert type(converted[1]) is nn.Sigmoid  # the model's output
    done = conversion_of(converted)
    assert done is not None and done.audit is not None and done.audit.left == ()


def test_a_recurrent_cell_stays_float_beside_a_converted_activation() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.rnn(x.unsqueeze(1))[0][:, -1]))

    model = Recurrent()
    assert_converted(model, convert(model, example=X))


@pytest.mark.parametrize("per_channel", [False, True])
def test_specs_reach_their_quantizers(per_channel: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))
    converted = convert(model, {"*": 2, "3": 4}, True, per_channel=per_channel)
    assert_converted(model, converted)
    shapes = {name: tuple(s.thresholds.shape) for name, s in quantizers(converted).items()}
    assert shapes == ({"1": (5, 3), "3": (4, 15)} if per_channel else {"1": (3,), "3": (15,)})
    assert len(list(converted.parameters())) == len(list(model.parameters())) + 6
    assert same_gradients(model, converted)
