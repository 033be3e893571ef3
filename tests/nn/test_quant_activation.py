"""QuantActivation as a module: its activation, tracing, copies, state dicts, types."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from small_quantizers import FUNCTIONS, T3, X, after, behaviour, model, same, switches, three
from torch import Tensor, fx, nn

from quantguard.core.specs import QuantSpec
from quantguard.nn.contexts import bypass, soften
from quantguard.nn.functional.staircase import staircase
from quantguard.nn.quant_activation import QuantActivation, quantizers


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("theirs_inplace", [False, True])
def test_it_applies_its_activation_and_leaves_the_input_alone(
        function: nn.Module, theirs_inplace: bool) -> None:
    function = copy.deepcopy(function)
    wanted = function(X.clone())
    if hasattr(function, "inplace"):
        setattr(function, "inplace", theirs_inplace)  # noqa: B010
    module, x = after(function), X.clone()
    step = torch.tensor(0.75)
    assert torch.equal(module(x), staircase(wanted, torch.tensor(T3), step, step, step * 0))
    with bypass(module):
        assert torch.equal(module(x), wanted)
    assert torch.equal(x, X)
    assert getattr(function, "inplace", theirs_inplace) == theirs_inplace


@pytest.mark.parametrize("switch", [None, "bypass", "soften", "sigmoid"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: type(f).__name__)
def test_in_place_writes_the_result_into_x_and_has_the_same_gradient(
        function: nn.Module, dynamic: bool, switch: str | None) -> None:
    results = []
    for inplace in (False, True):
        module, leaf = after(function, dynamic, inplace), X.clone().requires_grad_()
        x = leaf * 1
        with ExitStack() as stack:
            if switch:
                stack.enter_context(switches()[switch](module))
            y = module(x)
        assert (y is x) == inplace
        y.cos().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters())])
    for one, other in zip(*results, strict=True):
        assert one is other is None or torch.equal(one, other)


class Traced(nn.Module):
    """The same quantizer as plain operations, which a tracer records."""

    def __init__(self, clone: QuantActivation) -> None:
        super().__init__()
        self.thresholds, self.step = clone.thresholds, clone.step

    def forward(self, x: Tensor) -> Tensor:
        return self.step * (x.unsqueeze(-1) > self.thresholds).sum(-1)


@pytest.mark.parametrize("broken", [False, True])
def test_a_default_tracer_preserves_the_gradient_and_would_lose_it_inside(broken: bool) -> None:
    torch.manual_seed(0)
    stairs = after(nn.ReLU())
    net = nn.Sequential(nn.Linear(6, 8), Traced(stairs) if broken else stairs,
                        nn.Linear(8, 3))
    traced = fx.symbolic_trace(net)
    x = torch.randn(5, 6, requires_grad=True)
    assert torch.equal(traced(x), net(x))
    reached = traced(x).requires_grad and torch.autograd.grad(
        traced(x).square().sum(), x, allow_unused=True)[0]
    assert bool(isinstance(reached, Tensor) and reached.abs().sum() > 0) is not broken
    if not broken:
        assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
        with bypass(traced):  # the same quantizer, still switchable
            assert torch.equal(traced(x), net[2](net[0](x).relu()))


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def saved(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("dynamic", [False, True])
def test_copies_and_pickles_compute_the_same_and_share_nothing(
        copied: Callable[[Any], Any], dynamic: bool) -> None:
    module = after(nn.LeakyReLU(0.3), dynamic)
    if dynamic:
        nn.init.constant_(module.shift, 0.3)
    clone = copied(module)
    assert clone.spec == module.spec and repr(clone) == repr(module)
    assert same(behaviour(clone), behaviour(module))
    with bypass(module):
        assert not torch.equal(clone(X), module(X))
    with bypass(clone), bypass(module):
        assert torch.equal(clone(X), module(X))
    clone.set_thresholds([7.0, 8.0, 9.0], 1.0)
    assert not same(behaviour(clone), behaviour(module))


def small(dynamic: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 3), after(nn.ReLU(), dynamic))


@pytest.mark.parametrize("dynamic", [False, True])
def test_state_dict_round_trips(dynamic: bool) -> None:
    one, other = small(dynamic), small(dynamic)
    one[1].set_thresholds([0.1, 0.2, 0.7], 0.3, zero=1)
    if dynamic:
        nn.init.constant_(one[1].log_gaps, 0.4)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other[1].thresholds, one[1].thresholds)
    assert (other[1].step, other[1].zero) == (one[1].step, 1.0)


def test_a_state_dict_without_the_quantizer_does_not_change_it() -> None:
    net = small()
    plain = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    net.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(net[0].weight, plain[0].weight)
    assert net[1].thresholds.tolist() == T3


@pytest.mark.parametrize("gone", ["base", "base_step", "base_width", "zero_level", "shift",
                                  "log_gaps", "log_step"])
def test_a_state_dict_with_a_part_of_the_quantizer_is_an_error(gone: str) -> None:
    net = small(dynamic=True)
    state = net.state_dict()
    del state[f"1.{gone}"]
    with pytest.raises(RuntimeError, match=rf"Missing key.*\n?.*1\.{gone}"):
        net.load_state_dict(state)


@pytest.mark.parametrize("dynamic", [False, True])
def test_fixed_and_dynamic_states_do_not_load_into_each_other(dynamic: bool) -> None:
    with pytest.raises(RuntimeError, match="1.log_gaps"):
        small(dynamic).load_state_dict(small(not dynamic).state_dict())


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_per_channel_state_dict_sets_the_number_of_channels(dynamic: bool) -> None:
    placed = QuantActivation.from_thresholds(torch.tensor([T3] * 5), torch.arange(1.0, 6),
                                             dynamic=dynamic)
    fresh = QuantActivation(QuantSpec(2, dynamic, per_channel=True))
    fresh.load_state_dict(placed.state_dict())
    x = torch.randn(2, 5, 4)
    assert torch.equal(fresh(x), placed(x))


@pytest.mark.parametrize(("module", "text"), [
    (three(), "2 bits, fixed, after Identity"),
    (after(nn.ReLU6(), dynamic=True), "2 bits, dynamic, after ReLU6"),
    (QuantActivation(QuantSpec(1, form="sign"), nn.Tanh()), "1 bits, fixed, sign, after Tanh"),
    (QuantActivation.from_thresholds([[1.0], [2.0]], 1.0),
     "1 bits, fixed, 2 channels, after Identity"),
])
def test_repr_has_bits_form_and_activation(module: QuantActivation, text: str) -> None:
    assert repr(module) == f"QuantActivation({text})"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("bits", [2, 6])
def test_a_model_of_another_type_still_works(bits: int, channels: int | None,
                                             dtype: torch.dtype) -> None:
    rows = () if channels is None else (channels,)
    t = torch.arange(1, 2**bits).div(8).expand(*rows, -1)
    module = QuantActivation.from_thresholds(t, 0.125, dynamic=True).to(dtype)
    x = torch.linspace(-1, 9, 30).reshape(2, 3, 5).to(dtype).requires_grad_()
    y = module(x)
    y.sum().backward()
    count = (x.detach().float().unsqueeze(-1) > torch.arange(1, 2**bits).div(8)).sum(-1)
    assert torch.equal(y.detach(), (count * 0.125).to(dtype))
    assert x.grad is not None and x.grad.dtype == dtype and x.grad.abs().sum() > 0
    with soften(module, 4.0):
        assert module(x).dtype == dtype


def test_quantizers_are_found_by_their_full_name() -> None:
    net = model()
    assert quantizers(net) == {"0": net[0], "1.0": net[1][0]}
    assert not [m for m in net.modules() if isinstance(m, (nn.ReLU, nn.GELU))]
