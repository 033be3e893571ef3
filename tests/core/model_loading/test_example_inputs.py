"""Activations and input sizes that a model's source and configuration name are found."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantguard as qg
from quantguard.conversion.example_input import find_example
from quantguard.conversion.runtime_discovery import NOT_REACHED
from quantguard.nn.activation_kinds import described, kind_of, rebuilt

# torchao, which peft imports, has deprecation warnings with this torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("function", [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.3), nn.RReLU(0.1, 0.1), nn.Threshold(0.3, 0.1),
    nn.ELU(2.0), nn.SELU(), nn.CELU(2.0), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(),
    nn.Hardtanh(-2, 3), nn.Softplus(2.0, 5), nn.Softsign(), nn.LogSigmoid(), nn.Hardshrink(0.2),
    nn.Softshrink(0.2), nn.Tanhshrink(), nn.Tanh(), nn.Sigmoid(), nn.Hardsigmoid()], ids=str)
def test_activations_are_rebuilt_from_their_description(function: nn.Module) -> None:
    """Files describe intercepted calls in this form."""
    again = rebuilt(json.loads(json.dumps(described(function.eval())))).eval()
    x = torch.linspace(-8, 8, 101)
    assert type(again) is type(function)
    assert torch.equal(again(x), function(x))


@pytest.mark.parametrize("value", [{}, [], set(), bytearray(), torch.zeros(2), nn.ReLU(), 3, None,
                                   type("Odd", (), {"__eq__": lambda *_: True})()])
def test_objects_that_are_no_activations_have_no_kind(value: Any) -> None:
    assert kind_of(value) is None


def _logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.__dict__ or not vars(type(self)) or self.__class__.__name__ == "":
            raise AssertionError
        return function(self, *args, **kwargs)
    return wrapper


class Decorated(nn.Module):
    """A net with a decorated forward, in which a second activation depends on an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    @_logged
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        x = F.relu(self.layer(x))
        if kwargs.get("more"):
            x = F.silu(x)
        return self.layer(x)


def test_a_decorated_forward_is_read() -> None:
    plan = qg.inspect(Decorated())
    assert [(s.kind, s.reason) for s in plan.sites] == [("relu", ""), ("silu", NOT_REACHED)]


class Sized(nn.Module):
    """A net for images of one size, which one of its attributes names."""

    def __init__(self, channels: int, side: int, **attributes: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(channels * side * side, 3)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1)).relu()


class Config:
    def __init__(self, **settings: Any) -> None:
        self.__dict__ |= settings

    def __repr__(self) -> str:  # part of test names, so without an address
        return f"Config({self.__dict__})"


@pytest.mark.parametrize("attributes", [
    {"config": Config(image_size=20, num_channels=2)},
    {"config": Config(image_size=(20, 20), in_channels=2)},
    {"config": Config(image_size={"height": 20, "width": 20}, num_channels=2)},
    {"config": {"image_size": [20, 20], "num_channels": 2}},
    {"config": Config(vision_config=Config(image_size=20, num_channels=2))},
    {"config": Config(image_size=[2, 20, 20])},
    {"pretrained_cfg": {"input_size": (2, 20, 20)}},
    {"image_size": 20, "in_channels": 2}, {"img_size": (20, 20), "in_chans": 2}],
    ids=str)
@pytest.mark.parametrize("wrapped", [False, True])
def test_sizes_in_models_are_found(attributes: dict[str, Any], wrapped: bool) -> None:
    model = Sized(2, 20, **attributes)
    example = find_example(nn.Sequential(model) if wrapped else model)
    assert example.shape == (2, 2, 20, 20)


class Named(nn.Module):
    """A net whose main input is not its first argument, and may need a mask."""

    main_input_name = "pixel_values"

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.conv, self.masked = nn.Conv2d(3, 4, 3), masked

    def forward(self, input_ids: Any = None, pixel_values: Any = None,
                pixel_attention_mask: Any = None) -> Tensor:
        y = self.conv(pixel_values).relu()
        return y * (pixel_attention_mask[:, None, 1:-1, 1:-1] if self.masked else 2)


@pytest.mark.parametrize("masked", [False, True])
def test_the_main_input_is_passed_by_name(masked: bool) -> None:
    example = find_example(Named(masked))
    assert list(example) == ["pixel_values", "pixel_attention_mask"][:1 + masked]
    assert example["pixel_values"].shape == (2, 3, 224, 224)
    assert len(qg.convert(Named(masked)).quantguard.audit.ran) == 1


def test_invalid_sizes_are_ignored() -> None:
    for size in (True, 0, -4, "224", 10**9, (224,), (1, 2, 3, 4), None, Tensor()):
        found = find_example(nn.Sequential(nn.Linear(7, 2)))
        model = nn.Sequential(nn.Linear(7, 2))
        model.image_size = size
        assert find_example(model).shape == found.shape == (2, 7)
