"""Real architectures: bit-identical to the float model under bypass, quantized outside it."""

from __future__ import annotations

import pytest
import torch
from architecture_families import FAMILIES
from converted_pairs import (
    Condition,
    Pair,
    assert_identical,
    borrowed,
    finite,
    images,
    make_pair,
    run,
    same,
    step,
    tensors,
)
from lockstep import Lockstep
from torch import Tensor, nn

from quantguard.conversion.converter import conversion_of, restore
from quantguard.nn.contexts import bypass
from quantguard.nn.quant_activation import QuantActivation, quantizers


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest) -> Pair:
    """The pair of one family, made once; tests must not change it."""
    return make_pair(*FAMILIES[request.param][:2])


def over_families() -> pytest.MarkDecorator:
    """Parametrize a test over all families; a third of them are marked slow."""
    return pytest.mark.parametrize("pair", [
        pytest.param(name, marks=[pytest.mark.slow] if number % 3 == 1 else ())
        for number, name in enumerate(FAMILIES)], indirect=True, scope="module")


@over_families()
def test_bypass_is_the_float_model_bit_for_bit(pair: Pair) -> None:
    assert_identical(pair)


@over_families()
def test_nothing_is_left_in_float(pair: Pair) -> None:
    done = conversion_of(pair.converted)
    assert done is not None and done.audit is not None
    assert done.audit.left == () and done.audit.identical and done.audit.ran
    assert not any(isinstance(m, (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish))
                   for name, m in pair.converted.named_modules()
                   if name not in {site.name for site in done.plan.excluded})


@over_families()
def test_only_activations_are_quantized(pair: Pair, request: pytest.FixtureRequest) -> None:
    done = conversion_of(pair.converted)
    assert done is not None
    *_, kinds = FAMILIES[request.node.callspec.params["pair"]]
    assert {site.kind for site in done.plan.converted} == set(kinds.split())


def seen(model: nn.Module, x: Tensor, how: Condition) -> list[Tensor]:
    """Return the first image's output, and the output of every quantizer for it."""
    values: list[Tensor] = []
    handles = [module.register_forward_hook(lambda module, args, y: values.append(y.clone()))
               for module in quantizers(model).values()]
    model.eval()
    with torch.set_grad_enabled(how.grad):
        output = tensors(model(x.clone()))
    for handle in handles:
        handle.remove()
    return [t.detach()[: len(t) // len(x)] for t in (output[0], *values)]


@over_families()
def test_quantized_outputs_depend_neither_on_gradients_nor_on_the_batch(pair: Pair) -> None:
    """They are equal bit for bit if the float model's values are, and else up to rounding."""
    x, net = images(pair.shape, 5), pair.converted
    ways = ((x, Condition()), (x, Condition(grad=True)), (x[:1], Condition()))
    quantized = [seen(net, *way) for way in ways]
    with bypass(net):
        floats = [seen(net, *way) for way in ways]
    assert finite(quantized[0]) and not same(quantized[0][:1], floats[0][:1])
    for i in (1, 2):
        if same(floats[0], floats[i]):
            assert same(quantized[0], quantized[i]), ways[i][1]
    with torch.no_grad():
        lockstep = Lockstep(net, lambda: net(x.clone()))
        lockstep.assert_close(lambda: net(x[:1].clone()))
    lockstep.assert_close(lambda: net(x.clone()))


@over_families()
def test_quantized_runs_under_autocast(pair: Pair) -> None:
    model, converted, x = pair.model, pair.converted, images(pair.shape, 5)
    with borrowed(model, converted):
        for how in (Condition(autocast=True), Condition(training=True, autocast=True)):
            found, expected = run(converted, x, how), run(model, x, how)
            assert finite(found) and not same(found, expected)
            assert [t.dtype for t in found] == [t.dtype for t in expected]


@over_families()
def test_the_converted_model_has_the_users_classes_modes_and_state(pair: Pair) -> None:
    """A float checkpoint loads into it, too."""
    model, converted = pair.model, pair.converted
    assert isinstance(converted, type(model)) and type(converted).__name__ == type(model).__name__
    for name, module in model.named_modules():
        clone = converted.get_submodule(name)
        assert isinstance(clone, (type(module), QuantActivation)), name
        assert clone.training is module.training
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    assert [(name, p.requires_grad) for name, p in converted.named_parameters()] == flags
    assert not flags[0][1] and flags[-1][1]
    state, own = converted.state_dict(), model.state_dict()
    assert [name for name in state if name in own] == list(own)
    assert all(torch.equal(state[name], value) for name, value in own.items())
    added = [name for name in state if name not in own]
    everywhere = {name for name, m in converted.named_modules(remove_duplicate=False)
                  if isinstance(m, QuantActivation)}
    assert {name.rpartition(".")[0] for name in added} == everywhere
    with borrowed(converted):
        for tensor in state.values():
            tensor.zero_()
        converted.load_state_dict(own, strict=True)
        assert all(torch.equal(state[name], value) for name, value in own.items())
        assert not any(bool(state[name].any()) for name in added)  # unchanged by loading


@over_families()
def test_a_training_step_does_not_reach_the_original(pair: Pair) -> None:
    model, converted = pair.model, pair.converted
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with borrowed(converted):
        step(converted, images(pair.shape, 2))
        state, own = converted.state_dict(), model.state_dict()
        frozen, *others = dict(model.named_parameters())
        assert torch.equal(state[frozen], before[frozen])
        assert not all(torch.equal(state[name], before[name]) for name in others)
        assert all(torch.equal(value, before[name]) for name, value in own.items())
        assert all(p.grad is None for p in model.parameters())


@over_families()
def test_restore_returns_the_float_model_of_an_architecture(pair: Pair) -> None:
    back, model = restore(pair.converted), pair.model
    assert list(back.state_dict()) == list(model.state_dict())
    assert [(name, type(m)) for name, m in back.named_modules()] == [
        (name, type(m)) for name, m in model.named_modules()]
    x = images(pair.shape, 2)
    with borrowed(model):
        for how in (Condition(), Condition(training=True, grad=True)):
            assert same(run(back, x, how), run(model, x, how))
