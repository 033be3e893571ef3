"""Copies, files, hooks, tied weights, frozen parameters and modes of converted models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from architecture_families import RGB
from close_models import CLOSE, COPIES, Close, copies, make_close, over_close
from converted_pairs import Condition, Pair, assert_identical, images, run, same, step
from torch import nn

from quantguard.conversion.converter import conversion_of, convert, restore
from quantguard.nn.contexts import bypass
from quantguard.nn.quant_activation import quantizers


@over_close
@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_copies_and_files_hold_the_same_model(
        close: Close, how: Callable[[nn.Module], nn.Module],
        close_pairs: dict[Close, Pair]) -> None:
    converted = close_pairs[close].converted
    clone = how(converted)
    assert conversion_of(clone) == conversion_of(converted)
    assert_identical(replace(close_pairs[close], converted=clone))
    x = images(RGB, 5)
    expected = run(converted, x, Condition())
    for condition in (Condition(), Condition(training=True, grad=True)):
        one, other = copy.deepcopy(clone), copy.deepcopy(converted)
        assert same(run(one, x, condition), run(other, x, condition))
    if clone is not converted:
        step(clone, images(RGB, 2))
        assert not same(run(clone, x, Condition()), expected)
        assert same(run(converted, x, Condition()), expected)


def count_calls(model: nn.Module, where: list[str], log: list[str], backward: bool = True) -> None:
    """Record every call of the named modules in the log."""
    for name in where:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda m, a, n=name: log.append(f"{n} before"))
        module.register_forward_hook(lambda m, a, y, n=name: log.append(f"{n} after"))
        module.register_forward_hook(lambda m, a, k, y, n=name: log.append(f"{n} always"),
                                     with_kwargs=True, always_call=True)
        if backward:
            module.register_full_backward_pre_hook(
                lambda m, g, n=name: log.append(f"{n} backward before"))
            module.register_full_backward_hook(lambda m, g, h, n=name: log.append(f"{n} backward"))


def calls_of(model: nn.Module, log: list[str]) -> list[list[str]]:
    """Return the calls in eval mode, in training mode, and without gradients."""
    found = []
    for how in (Condition(grad=True), Condition(training=True, grad=True), Condition()):
        log.clear()
        run(model, images(RGB, 2), how)
        found.append(list(log))
    return found


@over_close
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_hooks_fire_as_often_and_in_the_same_order(close: Close, before: bool) -> None:
    """This holds for hooks registered before and after the conversion."""
    log: list[str] = []
    where = ["", close.container, close.leaf]
    pair = make_close(close, lambda model: count_calls(model, where, log) if before else None)
    if not before:
        count_calls(pair.model, where, log)
        count_calls(pair.converted, where, log)
    expected = calls_of(pair.model, log)
    assert [len(set(calls)) for calls in expected] == [15, 15, 9]
    assert calls_of(pair.converted, log) == expected
    with bypass(pair.converted):
        assert calls_of(pair.converted, log) == expected
    assert calls_of(copy.deepcopy(pair.converted), log) == expected
    assert calls_of(restore(pair.converted), log) == expected


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_hooks_on_an_activation_move_to_its_quantizer(name: str) -> None:
    """A ResNet block calls its ReLU twice, in place, which rules out backward hooks."""
    close, log = CLOSE[name], []
    pair = make_close(close, lambda model: count_calls(
        model, [close.activation], log, backward=name == "vit"))
    expected = calls_of(pair.model, log)
    assert expected[0].count(f"{close.activation} after") == {"resnet": 2, "vit": 1}[name]
    assert calls_of(pair.converted, log) == expected
    assert calls_of(restore(pair.converted), log) == expected


@over_close
def test_tied_weights_stay_tied(close: Close) -> None:
    one, other = close.tied

    def tie(model: nn.Module) -> None:
        model.get_submodule(other).weight = model.get_submodule(one).weight

    pair = make_close(close, tie)
    before = pair.model.state_dict()
    for clone in copies(pair.converted):
        for net in (clone, restore(clone)):
            assert net.get_submodule(one).weight is net.get_submodule(other).weight
            assert len(list(net.parameters())) == len(list(pair.model.parameters()))
    step(pair.converted, images(RGB, 2))
    for clone in copies(pair.converted):
        state = clone.state_dict()
        assert torch.equal(state[f"{one}.weight"], state[f"{other}.weight"])
        assert not torch.equal(state[f"{one}.weight"], before[f"{one}.weight"])


@over_close
def test_frozen_parameters_stay_frozen(close: Close) -> None:
    pair = make_close(
        close, lambda model: model.get_submodule(close.container).requires_grad_(False))

    def frozen(net: nn.Module) -> set[str]:
        return {name for name, p in net.named_parameters() if not p.requires_grad}

    expected = frozen(pair.model)
    assert expected
    before = copy.deepcopy(pair.model.state_dict())
    for clone in copies(copy.deepcopy(pair.converted)):
        assert frozen(clone) == frozen(restore(clone)) == expected
        step(clone, images(RGB, 2))
        changed = {name for name, p in clone.named_parameters() if not torch.equal(p, before[name])}
        assert changed and not changed & expected
    assert frozen(convert(pair.model, 2, dynamic=True, example=images(RGB, 1))) == expected


@over_close
def test_mixed_modes_survive(close: Close) -> None:
    """A container may be in eval mode, as in fine-tuning with frozen statistics."""
    def mix(model: nn.Module) -> None:
        model.train()
        model.get_submodule(close.container).eval()

    pair = make_close(close, mix)
    modes = {name: m.training for name, m in pair.model.named_modules()}
    assert len(set(modes.values())) == 2
    for clone in copies(copy.deepcopy(pair.converted)):
        for net in (clone, restore(clone)):
            now = {name: m.training for name, m in net.named_modules()}
            assert {name: now[name] for name in modes} == modes
        for name, module in quantizers(clone).items():
            assert module.training is modes.get(name, modes.get(name.rpartition(".")[0]))
        model, clone = copy.deepcopy(pair.model), copy.deepcopy(clone)
        outputs = []
        for net in (model, clone):
            with bypass(net), torch.random.fork_rng():
                torch.manual_seed(7)
                outputs.append([net(images(RGB, 5)).detach()])
        assert same(*outputs)
        state = clone.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
