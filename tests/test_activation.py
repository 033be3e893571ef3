"""QuantActivation: explicit numbers, learned thresholds, contexts, and its life as a module."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from quantguard.activation import GAP_FLOOR, QuantActivation, staircases
from quantguard.contexts import at_bits, backward, bypass, listening, observing, soften
from quantguard.errors import SpecError
from quantguard.spec import QuantSpec
from quantguard.staircase import MODES, Surrogate, soft_staircase, staircase

T3 = [0.5, 1.25, 2.5]
X = torch.linspace(-2, 4, 49)


def three(dynamic: bool = False) -> QuantActivation:
    return QuantActivation.from_thresholds(T3, step=0.75, zero=1, dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("channels", [None, 1, 4])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_from_thresholds_gives_back_its_numbers(bits: int, channels: int | None,
                                                dynamic: bool) -> None:
    rows = () if channels is None else (channels,)
    m = 2**bits - 1
    t = (0.1 + torch.rand(*rows, m, generator=torch.Generator().manual_seed(bits))).cumsum(-1)
    step = torch.full(rows, 0.3) + torch.arange(channels or 1).reshape(rows)
    module = QuantActivation.from_thresholds(t, step, zero=0.5, width=0.7, dynamic=dynamic)
    assert module.spec == QuantSpec(bits, dynamic, channels is not None)
    torch.testing.assert_close(module.thresholds, t, rtol=1e-6, atol=0)
    assert torch.equal(module.step, step)
    assert module.zero == 0.5
    x = torch.randn(2, channels or 3, 5)
    expected = staircase(x, module.thresholds, step, torch.full(rows, 0.7), torch.tensor(0.5),
                         axis=None if channels is None else 1)
    assert torch.equal(module(x), expected)
    assert len(list(module.parameters())) == (3 if dynamic else 0)


@pytest.mark.parametrize("step", [2.0, torch.tensor(2.0), torch.tensor([2.0])])
@pytest.mark.parametrize("t", [T3, torch.tensor(T3), torch.tensor([T3, T3])])
def test_one_step_is_taken_as_number_scalar_or_single_element(
        step: float | Tensor, t: list[float] | Tensor) -> None:
    module = QuantActivation.from_thresholds(t, step)
    assert module.step.shape == module.thresholds.shape[:-1]
    assert (module.step == 2).all()
    assert module(torch.ones(1, 2, 1)).flatten().tolist() == [2.0, 2.0]


@pytest.mark.parametrize(("arguments", "says"), [
    (([0.1, 0.2], 1.0), r"shape \(2,\)"),
    (([], 1.0), r"shape \(0,\)"),
    ((torch.arange(511.0), 1.0), r"shape \(511,\)"),
    ((torch.zeros(1, 1, 1), 1.0), r"shape \(1, 1, 1\)"),
    ((torch.tensor(1.0), 1.0), r"shape \(\)"),
    (([1.0, 1.0, 2.0], 1.0), "strictly ascending"),
    (([3.0, 2.0, 1.0], 1.0), "strictly ascending"),
    (([1.0, 2.0, math.inf], 1.0), "finite"),
    (([1.0, math.nan, 3.0], 1.0), "finite"),
    ((T3, 0.0), "step must be positive"),
    ((T3, -1.0), "step must be positive"),
    ((T3, math.nan), "step must be positive"),
    ((T3, math.inf), "step must be positive"),
    ((T3, torch.ones(2)), r"step has shape \(2,\)"),
    ((torch.tensor([T3, T3]), torch.ones(3)), r"step has shape \(3,\), expected one number or"),
    ((T3, 1.0, 0.3), "zero=0.3 must be a multiple of 1/2"),
    ((T3, 1.0, math.nan), "zero=nan"),
    ((T3, 1.0, 0, -1.0), "width must be positive"),
    ((T3, 1.0, 0, torch.ones(4)), r"width has shape \(4,\)"),
])
def test_numbers_that_make_no_staircase_are_refused(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        QuantActivation.from_thresholds(*arguments)


def test_placing_thresholds_that_do_not_fit_the_spec_is_refused_and_changes_nothing() -> None:
    module = three()
    for t in ([0.5], torch.tensor([T3])):
        with pytest.raises(SpecError, match=r"but QuantSpec\(bits=2"):
            module.set_thresholds(t, 1.0)
    with pytest.raises(SpecError, match="not 32"):
        QuantActivation(QuantSpec(32))
    assert module.thresholds.tolist() == T3


numbers = st.floats(-6, 6, width=32)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 4), shift=numbers, log_step=numbers,
       log_gaps=st.lists(numbers, min_size=14, max_size=14), seed=st.integers(0, 99))
def test_learned_thresholds_ascend_for_whatever_parameters(
        bits: int, shift: float, log_step: float, log_gaps: list[float], seed: int) -> None:
    m = 2**bits - 1
    generator = torch.Generator().manual_seed(seed)
    t = (0.05 + torch.rand(m, generator=generator)).cumsum(0)
    module = QuantActivation.from_thresholds(t, 0.5, dynamic=True)
    with torch.no_grad():
        module.shift.fill_(shift)
        module.log_step.fill_(log_step)
        module.log_gaps.copy_(torch.tensor(log_gaps[:m - 1]))
    moved = module.thresholds.detach()
    share = torch.tensor(log_gaps[:m - 1]).exp()
    assert float(moved[0]) == pytest.approx(float(t[0]) + 0.5 * shift, abs=1e-4)
    torch.testing.assert_close(moved.diff(), t.diff() * (GAP_FLOOR + (1 - GAP_FLOOR) * share),
                               rtol=2e-3, atol=2e-3)
    assert (moved.diff() > 0).all()
    assert float(module.step.detach()) == pytest.approx(0.5 * math.exp(log_step), rel=1e-4)


def test_gaps_have_a_floor_however_far_a_parameter_falls() -> None:
    module = three(dynamic=True)
    with torch.no_grad():
        module.log_gaps.fill_(-1e4)
    floor = torch.tensor(T3).diff() * GAP_FLOOR
    torch.testing.assert_close(module.thresholds.diff(), floor, rtol=1e-4, atol=0)


@pytest.mark.parametrize("channels", [None, 3])
def test_learned_parameters_get_the_gradient_of_the_thresholds(channels: int | None) -> None:
    t = torch.tensor(T3) if channels is None else torch.tensor(T3).repeat(channels, 1)
    module = QuantActivation.from_thresholds(t, 0.75, dynamic=True)
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0)) + 1
    module(x).sum().backward()
    leaf = t.clone().requires_grad_()
    step = module.step.detach().clone().requires_grad_()
    staircase(x, leaf, step, torch.ones(t.shape[:-1]), torch.tensor(0.0),
              axis=None if channels is None else 1).sum().backward()
    assert leaf.grad is not None and step.grad is not None
    assert leaf.grad.abs().sum() > 0
    gaps = t.diff() * (1 - GAP_FLOOR)
    later = leaf.grad.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    torch.testing.assert_close(module.shift.grad, 0.75 * leaf.grad.sum(-1))
    torch.testing.assert_close(module.log_gaps.grad, gaps * later)
    torch.testing.assert_close(module.log_step.grad, 0.75 * step.grad)


@pytest.mark.parametrize(("t", "zero", "width", "dynamic", "shift", "expected"), [
    (0.5, 0, None, False, 0.0, 1.0),   # 2 t_1
    (0.5, 0, 3.0, False, 0.0, 3.0),    # as told
    (-0.5, 0, None, False, 0.0, 0.75),  # t_1 below 0: the step
    (0.5, 0.5, None, False, 0.0, 0.75),  # signed: the step
    (0.5, 0, None, True, 1.0, 2.5),    # learned: 2 t_1 moves with t_1 = 0.5 + 0.75
    (0.5, 0, None, True, -0.6, 1.0),   # t_1 = 0.05, not well above 0: the calibrated constant
    (0.5, 0.5, None, True, 1.0, 0.75),
])
def test_window_at_one_bit(t: float, zero: float, width: float | None, dynamic: bool, shift: float,
                           expected: float) -> None:
    module = QuantActivation.from_thresholds([t], 0.75, zero, width, dynamic)
    if dynamic:
        nn.init.constant_(module.shift, shift)
    x = torch.linspace(-4, 4, 4001, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    inside = x.detach()[x.grad > 0]
    first = float(module.thresholds.detach())
    assert float(inside.max() - inside.min()) == pytest.approx(expected, abs=0.01)
    assert float(inside.max() + inside.min()) / 2 == pytest.approx(first, abs=0.01)
    assert float(x.grad.max()) == pytest.approx(0.75 / expected, rel=1e-4)


FUNCTIONS = [nn.ReLU(), nn.ReLU6(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.LeakyReLU(0.3),
             nn.ELU(), nn.Hardswish()]


def after(function: nn.Module, dynamic: bool = False, inplace: bool = False) -> QuantActivation:
    module = QuantActivation(QuantSpec(2, dynamic), function, inplace=inplace)
    module.set_thresholds(T3, 0.75)
    return module


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("theirs_inplace", [False, True])
def test_staircase_follows_its_activation_and_leaves_the_input_alone(
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


def switches() -> dict[str, Callable[[nn.Module], AbstractContextManager[nn.Module]]]:
    return {
        "bypass": bypass, "soften": lambda m: soften(m, 4.0), "softer": lambda m: soften(m, 2),
        **{mode: lambda m, mode=mode: backward(m, mode) for mode in (*MODES[1:], "sigmoid(3)")},
        "observing": lambda m: observing(m, {})}


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


def behaviour(module: nn.Module) -> tuple[Tensor, Tensor]:
    x = X.clone().requires_grad_()
    y = module(x)
    y.sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(after(nn.ReLU()), nn.Sequential(after(nn.GELU())))


def test_bypass_is_the_float_function() -> None:
    net = model()
    with bypass(net) as inside:
        assert inside is net
        assert torch.equal(net(X), nn.GELU()(nn.ReLU()(X)))


@pytest.mark.parametrize(("mode", "surrogate"), [
    ("ramp", Surrogate()), ("ste", Surrogate("ste")), ("parent", Surrogate("parent")),
    ("sigmoid", Surrogate("sigmoid", 8.0)), ("sigmoid(3)", Surrogate("sigmoid", 3.0)),
    ("sigmoid(2.5)", Surrogate("sigmoid", 2.5))])
def test_backward_chooses_the_gradient_and_only_that(mode: str, surrogate: Surrogate) -> None:
    module = after(nn.ReLU())
    step, x = torch.tensor(0.75), X.clone().requires_grad_()
    y = staircase(x, torch.tensor(T3), step, step, step * 0, surrogate, (0.0, math.inf))
    y.sum().backward()
    assert x.grad is not None
    with backward(module, mode):
        assert same(behaviour(module), (y.detach(), x.grad))


def test_soften_is_the_softened_twin_at_its_sharpness() -> None:
    module, step = after(nn.SiLU()), torch.tensor(0.75)
    for k in (2, 8.0):
        with soften(module, k):
            expected = soft_staircase(nn.SiLU()(X), torch.tensor(T3), step, step, step * 0, k)
            assert torch.equal(module(X), expected)


@pytest.mark.parametrize("name", switches())
def test_a_context_changes_something_and_ends_even_after_an_exception(name: str) -> None:
    net = model()
    before = behaviour(net)
    with switches()[name](net):
        assert not same(behaviour(net), before)
    assert same(behaviour(net), before)
    with pytest.raises(ZeroDivisionError), switches()[name](net):
        1 / 0  # noqa: B018
    assert same(behaviour(net), before)


@pytest.mark.parametrize("inner", switches())
@pytest.mark.parametrize("outer", switches())
def test_contexts_nest(outer: str, inner: str) -> None:
    net = model()
    first = behaviour(net)
    with switches()[outer](net):
        before = behaviour(net)
        with pytest.raises(ZeroDivisionError), switches()[inner](net):
            1 / 0  # noqa: B018
        assert same(behaviour(net), before)
        with switches()[inner](net[1]):  # a part of the model
            pass
        assert same(behaviour(net), before)
    assert same(behaviour(net), first)


def test_a_surrogate_chosen_outside_holds_inside_other_contexts() -> None:
    module = after(nn.ReLU())
    with backward(module, "ste"):
        ste = behaviour(module)
        with bypass(module), backward(module, "sigmoid"):
            assert torch.equal(behaviour(module)[0], nn.ReLU()(X))
        assert same(behaviour(module), ste)


@pytest.mark.parametrize("mode", ["", "ramps", "RAMP", "ste(3)", "sigmoid()", "sigmoid(-1)",
                                  "sigmoid(k)", "sigmoid(1.2.3)", "sigmoid(.)", "sigmoid(0)"])
def test_unknown_surrogates_are_refused(mode: str) -> None:
    net = model()
    before = behaviour(net)
    with pytest.raises(SpecError, match="unknown|positive"), backward(net, mode):
        pass
    assert same(behaviour(net), before)


@pytest.mark.parametrize("k", [0, -1.0, math.nan, math.inf, "4", None])
def test_impossible_sharpness_is_refused(k: Any) -> None:
    net = model()
    with pytest.raises(SpecError, match="must be a positive number"), soften(net, k):
        pass


def test_contexts_leave_a_model_without_staircases_alone() -> None:
    net = nn.Linear(2, 2)
    with bypass(net), backward(net, "ste"), soften(net, 3):
        assert net(torch.zeros(1, 2)).shape == (1, 2)


def test_listeners_hear_what_is_quantized_and_what_is_observed_and_then_no_more() -> None:
    net, heard = model(), []
    with listening(net, {"1.0": heard.append}):
        net(X)
    with observing(net, {"1.0": heard.append}):
        net(X)
    net(X)
    assert len(heard) == 2
    assert torch.equal(heard[0], nn.GELU()(net[0](X)))
    assert torch.equal(heard[1], nn.GELU()(nn.ReLU()(X)))


class WalkedInto(nn.Module):
    """The broken twin: the same staircase, which a tracer walks into."""

    def __init__(self, twin: QuantActivation) -> None:
        super().__init__()
        self.thresholds, self.step = twin.thresholds, twin.step

    def forward(self, x: Tensor) -> Tensor:
        return self.step * (x.unsqueeze(-1) > self.thresholds).sum(-1)


@pytest.mark.parametrize("broken", [False, True])
def test_a_default_tracer_keeps_the_gradient_and_would_lose_it_inside(broken: bool) -> None:
    torch.manual_seed(0)
    stairs = after(nn.ReLU())
    net = nn.Sequential(nn.Linear(6, 8), WalkedInto(stairs) if broken else stairs,
                        nn.Linear(8, 3))
    traced = fx.symbolic_trace(net)
    x = torch.randn(5, 6, requires_grad=True)
    assert torch.equal(traced(x), net(x))
    reached = traced(x).requires_grad and torch.autograd.grad(
        traced(x).square().sum(), x, allow_unused=True)[0]
    assert bool(isinstance(reached, Tensor) and reached.abs().sum() > 0) is not broken
    if not broken:
        assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
        with bypass(traced):  # the same staircase, still switchable
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
    twin = copied(module)
    assert twin.spec == module.spec and repr(twin) == repr(module)
    assert same(behaviour(twin), behaviour(module))
    with bypass(module):
        assert not torch.equal(twin(X), module(X))
    with bypass(twin), bypass(module):
        assert torch.equal(twin(X), module(X))
    twin.set_thresholds([7.0, 8.0, 9.0], 1.0)
    assert not same(behaviour(twin), behaviour(module))


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


def test_a_state_dict_without_the_staircase_keeps_its_values() -> None:
    net = small()
    plain = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    net.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(net[0].weight, plain[0].weight)
    assert net[1].thresholds.tolist() == T3


@pytest.mark.parametrize("gone", ["base", "base_step", "base_width", "zero_level", "shift",
                                  "log_gaps", "log_step"])
def test_a_state_dict_with_a_part_of_the_staircase_is_an_error(gone: str) -> None:
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
def test_a_per_channel_state_brings_its_number_of_channels(dynamic: bool) -> None:
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
def test_repr_says_what_it_is(module: QuantActivation, text: str) -> None:
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


def test_staircases_are_found_by_their_full_name() -> None:
    net = model()
    assert staircases(net) == {"0": net[0], "1.0": net[1][0]}
    assert not [m for m in net.modules() if isinstance(m, (nn.ReLU, nn.GELU))]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("zero", [0.0, 1.5])
def test_other_bits_over_the_same_range(bits: int, zero: float) -> None:
    module = QuantActivation.from_thresholds(torch.tensor([0.5, 1.5, 2.5]) - zero, 1.0, zero)
    x = torch.linspace(-4, 5, 4001)
    plain = module(x)
    with at_bits(module, bits):
        y = module(x)
        assert len(y.unique()) == 2**bits
        assert y.min() == plain.min() and torch.isclose(y.max(), plain.max())
        with soften(module, 200.0):
            assert (module(x) - y).abs().mean() < 0.02
    if bits == 2:
        assert torch.equal(y, plain)
    if bits == 8:  # nearly the line through its levels
        line = x.clamp(plain.min(), plain.max())
        assert (y - line).abs().max() < 0.01
    assert torch.equal(module(x), plain)
    with at_bits(module, 32):
        assert torch.equal(module(x), x)


def test_other_bits_of_learned_thresholds_keep_their_places() -> None:
    module = QuantActivation.from_thresholds([[0.0, 1.0, 4.0], [1.0, 2.0, 3.0]], 1.0, dynamic=True)
    x = torch.tensor([[0.1, 0.6, 3.9, 9.0], [0.9, 1.6, 2.1, 9.0]])
    with at_bits(module, 8):
        # the middle between two thresholds is their level, and thresholds are half-way to it
        y = module(torch.stack([x, x]))
    assert y.shape == (2, 2, 4) and (y[0] - torch.tensor(
        [[0.6, 1.1, 2.47, 3.0], [0.4, 1.1, 1.6, 3.0]])).abs().max() < 0.02


def test_other_bits_of_one_threshold_use_its_window() -> None:
    module = QuantActivation.from_thresholds([1.0], 2.0, width=2.0)
    with at_bits(module, 8):
        assert (module(torch.tensor([0.0, 0.5, 1.0, 2.0])) -
                torch.tensor([0.0, 0.5, 1.0, 2.0])).abs().max() < 0.01


def test_impossible_bits_are_refused() -> None:
    with pytest.raises(SpecError, match="bits=9"), at_bits(three(), 9):
        pass
