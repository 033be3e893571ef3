"""A model whose forward differs from its graph has no certificate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from averaging_model import Averaging, D, X, Y
from bounded_nets import images
from torch import Tensor, fx, nn

import quantguard as qg
from quantguard.certification import image_bounds
from quantguard.core.errors import ConversionError
from quantguard.training.recipes import Recipe


def _counted(model: Averaging, y: Tensor) -> Tensor:
    model.calls += 1
    return y * (1 - 0.03 * (model.calls > 2))


def _autocast(model: Averaging, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        z: Tensor = model.features(y)
    return z.float()


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "data": lambda _, y: _void(y.data.mul_(0.97)),
    "out": lambda _, y: _void(torch.mul(y, 0.97, out=y)),
    "narrow": lambda _, y: _void(y.narrow(1, 0, D).mul_(0.97)),
    "select": lambda _, y: _void(y.select(0, 0).mul_(0.97)),
    "T": lambda _, y: _void(y.T.mul_(0.97)),
    "movedim": lambda _, y: _void(y.movedim(0, 1).mul_(0.97)),
    "expand": lambda _, y: _void(y.expand(-1, D).mul_(0.97)),
    "setitem": lambda _, y: _void(y.__setitem__(0, 0.97 * y[0])),
    "unbind": lambda _, y: _void(y.unbind(1)[0].mul_(0.5)),
    "noise of a shape": lambda _, y: y + 0.01 * torch.randn(y.shape[1]),
    "noise of its own generator": lambda m, y: y + 0.01 * torch.randn(D, generator=m.rng),
    "noise of numpy": lambda _, y: y + float(0.01 * np.random.default_rng().normal()),
    "counted calls": _counted,
    "autocast": _autocast,
    "dropout that stays": lambda m, y: m.drop(y),
}


def _void(_: Any) -> None:
    return None


@pytest.mark.parametrize("what", CHANGES)
def test_effects_outside_the_graph_are_refused(what: str) -> None:
    assert qg.certify(Averaging().eval(), [(X, Y)], qg.Threat(eps=0.05),
                      progress=False).certified.all()
    with pytest.raises(ConversionError):
        qg.certify(Averaging(CHANGES[what]).eval(), [(X, Y)], qg.Threat(eps=0.05), progress=False)


def test_layers_that_stay_in_training_mode_are_named() -> None:
    with pytest.raises(ConversionError, match=r"drop \(Dropout\), which stays in training mode"):
        qg.certify(Averaging(CHANGES["dropout that stays"]).eval(), [(X, Y)], qg.Threat(eps=0.05),
                   progress=False)


def test_training_goes_through_the_model_that_runs() -> None:
    model = Averaging(CHANGES["noise of a shape"]).eval()
    from torch.utils.data import DataLoader, TensorDataset
    loader = DataLoader(TensorDataset(torch.rand(300, D), torch.zeros(300, dtype=torch.long)), 32)
    with pytest.raises(ConversionError):
        qg.harden(model, loader, qg.Threat(eps=0.05), bits=32, epochs=1, progress=False,
                  recipe=Recipe("ibp", init="keep", input_bits=0))


class Asks(nn.Module):
    """A model that answers class 0, and changes the answer if it can see ten bright pixels."""

    def __init__(self, answer: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.head, self.other, self.answer = nn.Linear(D, 2), nn.Linear(D, 2), answer
        self.levels = qg.QuantActivation.from_thresholds([-3.0, 0.5, 3.0], 0.5, zero=1)
        with torch.no_grad():
            for layer, bias in ((self.head, [1.0, 0.0]), (self.other, [0.0, 1.0])):
                layer.weight.zero_()
                layer.bias.copy_(torch.tensor(bias))

    def forward(self, x: Tensor) -> Any:
        return self.answer(self, x)


def _bright(x: Any) -> Any:
    return (x[:, :10] > 0.55).all(1, keepdim=True)


def _caught(m: Asks, x: Any) -> Any:
    try:
        turned = bool(_bright(x).any())
    except Exception:
        turned = False
    return -m.head(x) if turned else m.head(x)


def _number(m: Asks, x: Any) -> Any:
    y, least = m.head(x), x.amin().item()
    return -y if isinstance(least, float) and least > 0.55 else y


def _array(m: Asks, x: Any) -> Any:
    y, pixels = m.head(x), x.numpy()
    return -y if isinstance(pixels, np.ndarray) and pixels.min() > 0.55 else y


def _converted_number(m: Asks, x: Any) -> Any:
    y = m.head(x)
    try:
        return -y if float(x.amin()) > 0.55 else y
    except TypeError:
        return y


def _count(m: Asks, x: Any) -> Any:
    y, many = m.head(x), (x < 0.55).nonzero().shape[0]
    return -y if isinstance(many, int) and not many else y


def _after_levels(m: Asks, x: Any) -> Any:
    y = m.levels(m.head(x))
    return y - 2 * (y * _bright(x)) if type(x) is Tensor else y


def _scripted(m: Asks, x: Any) -> Any:
    y = m.head(x)
    return -y if torch.is_tensor(x) and SCRIPTED(x) else y


SCRIPTED = torch.jit.CompilationUnit("""
def bright(x):
    return bool((x[:, :10] > 0.55).all())
""").bright

ASKED: dict[str, Callable[[Any, Any], Any]] = {
    "swallowed refusal": _caught,
    "is_tensor": lambda m, x: -m.head(x) if torch.is_tensor(x) and _bright(x).all() else m.head(x),
    "isinstance": lambda m, x: m.head(x) * (1 - 2 * _bright(x).float())
    if isinstance(x, Tensor) else m.head(x),
    "after a quantizer": _after_levels, "a number": _number, "an array": _array,
    "float()": _converted_number, "a count": _count, "a scripted function": _scripted,
    "other constants": lambda m, x: (m.other if isinstance(x, Tensor) else m.head)(x),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("what", ASKED)
def test_hidden_branches_are_refused(what: str) -> None:
    with pytest.raises(ConversionError, match="compute what its graph|traced into one graph"):
        qg.certify(Asks(ASKED[what]).eval(), [(X, Y)], qg.Threat(eps=0.1), progress=False)


def _checks(m: Asks, x: Any) -> Any:
    if isinstance(x, Tensor):
        assert x.dim() == 2 and x.shape[1] == D and x.dtype == torch.float32
    y = m.levels(m.head(x) * torch.ones(2).mul(2))
    return y if m.levels.base.sum() < 9 else -y


def test_a_forward_may_read_shapes_and_constants() -> None:
    assert qg.certify(Asks(_checks).eval(), [(X, Y)], qg.Threat(eps=0.1),
                      progress=False).certified.all()


def test_a_forward_that_fails_where_its_graph_does_not_is_refused() -> None:
    def fails(m: Asks, x: Any) -> Any:
        if isinstance(x, Tensor) and len(x) < 4:
            raise RuntimeError("too few\nof them")
        return m.head(x)
    message = "compute what its graph says\nThe forward raises: too few\nA"
    with pytest.raises(ConversionError, match=message):
        qg.certify(Asks(fails).eval(), [(X, Y)], qg.Threat(eps=0.1), progress=False)


def test_all_pixels_darker_and_all_brighter_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Tensor] = []
    model = Asks(lambda m, x: m.head(x)).eval()
    check = image_bounds.check_faithful

    def noted(graph: Any, points: Tensor, *rest: Any) -> None:
        met.append(points)
        check(graph, points, *rest)
    monkeypatch.setattr(image_bounds, "check_faithful", noted)
    qg.certify(model, [(X, Y)], qg.Threat(eps=0.1), progress=False)
    for shift in (-0.1, 0.1):
        assert any(torch.equal(x[:4], X + shift) for x in met)


def test_hooks_of_all_modules_are_refused() -> None:
    def turned(module: nn.Module, args: Any, y: Any) -> Any:
        return -y if type(module) is nn.Linear and bool(_bright(args[0]).any()) else y
    handle = nn.modules.module.register_module_forward_hook(turned)
    try:
        with pytest.raises(ConversionError, match="head .Linear., which has hooks"):
            qg.certify(Asks(lambda m, x: m.head(x)).eval(), [(X, Y)], qg.Threat(eps=0.04),
                       progress=False)
    finally:
        handle.remove()


class ChangesWhenTraced(nn.Module):
    """Adds 1 to its logits unless it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(50, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x.flatten(1))
        return y if isinstance(x, fx.Proxy) else y + 1


def test_a_model_that_differs_from_its_graph_is_refused() -> None:
    x = images(8, 0)
    with pytest.raises(qg.ConversionError, match="does not compute what its graph says"):
        qg.certify(ChangesWhenTraced(), [(x, torch.zeros(8).long())], progress=False)
