"""Training, memory formats, autocast and state dicts of converted models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architecture_families import RGB
from close_models import Close, over_close
from converted_pairs import Condition, Pair, finite, images, run, same, step, tensors, worn
from lockstep import Lockstep
from torch import nn

from quantguard.conversion.converter import conversion_of, convert, restore
from quantguard.nn.contexts import bypass
from quantguard.nn.quant_activation import quantizers


@over_close
def test_training_under_bypass_is_training_the_float_model(
        close: Close, close_pairs: dict[Close, Pair]) -> None:
    model, clone = (copy.deepcopy(net) for net in (close_pairs[close].model,
                                                  close_pairs[close].converted))
    for number in (2, 3, 5):
        for net in (model, clone):
            with bypass(net), torch.random.fork_rng():
                torch.manual_seed(number)
                step(net, images(RGB, number))
    state, before = clone.state_dict(), close_pairs[close].model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not all(torch.equal(v, state[k]) for k, v in before.items())


@over_close
@pytest.mark.skipif(torch.cuda.is_available(), reason="DataParallel would move it to the GPU")
def test_data_parallel_wraps_it(close: Close, close_pairs: dict[Close, Pair]) -> None:
    pair = close_pairs[close]
    x, converted = images(RGB, 5), copy.deepcopy(pair.converted)
    wrapped = nn.DataParallel(converted)
    assert wrapped.module is converted and conversion_of(wrapped) is conversion_of(converted)
    assert same(run(wrapped, x, Condition()), run(converted, x, Condition()))
    with bypass(wrapped):
        assert same(run(wrapped, x, Condition()), run(pair.model, x, Condition()))
    assert same(run(restore(wrapped), x, Condition()), run(pair.model, x, Condition()))


@over_close
def test_channels_last(close: Close, close_pairs: dict[Close, Pair]) -> None:
    """A quantizer preserves the memory format, and its values do not depend on it."""
    def last(value: Any) -> Any:
        return copy.deepcopy(value).to(memory_format=torch.channels_last)

    model, converted = last(close_pairs[close].model), last(close_pairs[close].converted)
    x = images(RGB, 5)
    expected = [tensors(net(last(x)))[0].detach() for net in (model, converted)]
    with bypass(converted):
        assert same([converted(last(x)).detach()], expected[:1])
    assert not same(expected[:1], expected[1:])
    orders: list[bool] = []
    for module in quantizers(converted).values():
        module.register_forward_hook(lambda module, args, y: orders.append(
            y.stride() == args[0].stride() and y.is_contiguous(memory_format=torch.channels_last)
            if y.dim() == 4 else y.stride() == args[0].stride()))
    with torch.no_grad():
        lockstep = Lockstep(converted, lambda: converted(last(x)))
        lockstep.model = plain = copy.deepcopy(close_pairs[close].converted)
        lockstep.assert_close(lambda: plain(x.clone()))
    assert orders and all(orders)


@over_close
@pytest.mark.parametrize("dynamic", [False, True])
def test_autocast_quantizes_in_the_autocast_dtype(close: Close, dynamic: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = worn(close.build(), RGB)
    converted = convert(model, 2, dynamic, example=images(RGB, 1))
    types = set()
    for module in quantizers(converted).values():
        module.register_forward_hook(
            lambda module, args, y: types.add((args[0].dtype, y.dtype, y.unique().numel() <= 4)))
    for training in (False, True):
        found = run(converted, images(RGB, 5), Condition(training, True, autocast=True))
        assert finite(found)
    assert {(before is after, few) for before, after, few in types} == {(True, True)}
    assert torch.bfloat16 in {before for before, *_ in types}


@over_close
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_state_dict_with_part_of_a_quantizer_is_an_error_and_without_one_is_not(
        close: Close, dynamic: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = close.build()
    converted = convert(model, 2, dynamic, example=images(RGB, 1))
    state, name = converted.state_dict(), close.activation
    keys = [key for key in state if key.rpartition(".")[0] == name]
    assert len(keys) == (7 if dynamic else 4)
    for key in keys:
        damaged = {k: v for k, v in state.items() if k != key}
        with pytest.raises(RuntimeError, match=f"Missing key.*{key}"):
            copy.deepcopy(converted).load_state_dict(damaged, strict=True)
        missing, unexpected = copy.deepcopy(converted).load_state_dict(damaged, strict=False)
        assert missing == [key] and unexpected == []
    target = copy.deepcopy(converted)
    without = {k: v + 1 if v.is_floating_point() else v for k, v in state.items() if k not in keys}
    target.load_state_dict(without, strict=True)
    after = target.state_dict()
    assert all(torch.equal(after[key], state[key]) for key in keys)
    assert all(torch.equal(after[key], value) for key, value in without.items())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state, strict=True)


@over_close
def test_a_fixed_checkpoint_does_not_load_into_a_dynamic_model(
        close: Close, close_pairs: dict[Close, Pair]) -> None:
    """Else the fixed thresholds would load and the learned ones stay as they are."""
    pair = close_pairs[close]
    learned = convert(pair.model, 2, dynamic=True, example=images(RGB, 1))
    with pytest.raises(RuntimeError, match="Missing key"):
        learned.load_state_dict(pair.converted.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        copy.deepcopy(pair.converted).load_state_dict(learned.state_dict(), strict=True)
