"""Checks that any converted model must pass, shared by the zoo and the random networks."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from conversion_zoo.base import SETTINGS, TYPICAL, Case, Setting
from conversion_zoo.pairs import BITS, Pair, copy_of, seeded_random, seen, tensors
from quantguard.conversion.converter import conversion_of, restore
from quantguard.core.nested_tensors import changed
from quantguard.nn.contexts import bypass
from quantguard.nn.quant_activation import quantizers

LEVELS = 2**BITS


class Result(NamedTuple):
    outputs: list[Tensor]
    input_gradients: list[Tensor | None]
    gradients: dict[str, Tensor | None]


def run(model: nn.Module, inputs: Any, grad: bool = False, seed: int = 0) -> Result:
    """Run model on copies of inputs with seeded random numbers, and backward if possible."""
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        x = x.detach().clone()
        if grad and x.is_floating_point():
            leaves.append(x.requires_grad_())
        return x

    inputs = changed(inputs, leaf)
    model.zero_grad()
    with seeded_random(seed), torch.set_grad_enabled(grad):
        if isinstance(inputs, dict):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        outputs = tensors(output)
        loss = sum(o.double().square().sum() for o in outputs)
        if grad and isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()
    return Result([o.detach() for o in outputs], [x.grad for x in leaves],
                  {n: p.grad for n, p in model.named_parameters()})


def equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two tensors are equal bit for bit, including NaN."""
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and one.shape == other.shape and bool(
        ((one == other) | (one.isnan() & other.isnan())).all())


def assert_same(a: Result, b: Result, where: Any) -> None:
    """Compare two results bit for bit; b may have gradients of further parameters."""
    assert len(a.outputs) == len(b.outputs), where
    assert all(map(equal, a.outputs, b.outputs)), f"outputs, {where}"
    assert all(map(equal, a.input_gradients, b.input_gradients)), f"input gradients, {where}"
    wrong = [n for n, g in a.gradients.items() if not equal(g, b.gradients[n])]
    assert not wrong, f"gradients of {wrong}, {where}"


def differ(a: Result, b: Result) -> bool:
    return any(not equal(x, y) for x, y in zip(a.outputs, b.outputs, strict=True))


def inputs_of(case_inputs: Callable[[int], Any], setting: Setting) -> Any:
    return changed(case_inputs(setting.batch),
                   lambda x: x * setting.factor if x.is_floating_point() else x)


def assert_same_everywhere(model: nn.Module, other: nn.Module, inputs: Callable[[int], Any],
                           around: Callable[[nn.Module], AbstractContextManager[Any]] = bypass,
                           each: tuple[Setting, ...] = SETTINGS,
                           grads: tuple[bool, ...] = (False, True)) -> None:
    """Run both models on the same inputs in turn; results and stored values must agree."""
    for training in (True, False):
        a, b = copy_of(model, training), copy_of(other, training)
        for setting in [s for s in each if s.training is training]:
            for grad in grads:
                x = inputs_of(inputs, setting)
                with around(b):
                    result = run(b, x, grad, setting.seed)
                assert_same(run(a, x, grad, setting.seed), result, (setting, grad))
        remembered = b.state_dict()
        assert all(equal(v, remembered[k]) for k, v in a.state_dict().items())
        for (path, x), y in zip(a.named_modules(), map(b.get_submodule, dict(a.named_modules())),
                                strict=True):
            for key in vars(x).keys() - {"training"}:
                if type(x) is type(y) and isinstance(vars(x)[key], (int, float, str)):
                    assert vars(x)[key] == vars(y)[key], f"{path}.{key}"


@contextmanager
def warned(case: Case) -> Iterator[None]:
    """Ignore the warnings that a case is expected to raise."""
    with warnings.catch_warnings():
        if case.warns:
            warnings.filterwarnings("ignore", "the .* runs in float: no input reached it")
        yield


def kinds(model: nn.Module) -> tuple[str, tuple[str, ...]]:
    done = conversion_of(model)
    assert done is not None
    return (" ".join(sorted(site.kind for site in done.plan.converted)),
            tuple(sorted(f"{site.kind}: {site.reason}" for site in done.plan.excluded)))


def assert_active(model: nn.Module, converted: nn.Module, inputs: Callable[[int], Any]) -> None:
    for setting in TYPICAL:
        a, b, c = (copy_of(m, setting.training) for m in (model, converted, converted))
        x = inputs_of(inputs, setting)
        float_result, result = run(a, x), run(b, x)
        assert differ(float_result, result), f"not quantized: {setting}"
        called: set[nn.Module] = set()
        for module in quantizers(c).values():
            module.register_forward_hook(lambda m, *_, called=called: called.add(m))
        float_with_grad, with_grad = run(a, x, True), run(c, x, True)
        if not differ(float_result, float_with_grad):
            assert not differ(with_grad, result), f"other bits with grad: {setting}"
        for path, module in quantizers(c).items():
            if module.spec.dynamic and module in called:
                assert module.shift.grad is not None, f"{path} does not learn"
        for one, other in zip(float_with_grad.input_gradients, with_grad.input_gradients,
                              strict=True):
            assert (one is None) == (other is None)
            assert other is None or bool(other.isfinite().all())


def assert_levels(converted: nn.Module, inputs: Callable[[int], Any],
                  unreached: tuple[str, ...] = (), each: tuple[Setting, ...] = SETTINGS) -> None:
    """Check that the output of each quantizer has no more values than it has levels."""
    reached: set[str] = set()
    for training in (True, False):
        clone = copy_of(converted, training)

        def look(module: Any, _: Any, y: Tensor, name: str) -> None:
            reached.add(name)
            assert y.detach().unique().numel() <= LEVELS, name

        for path, module in quantizers(clone).items():
            module.register_forward_hook(functools.partial(look, name=path))
        for setting in each:
            if setting.training is training:
                run(clone, inputs_of(inputs, setting), setting.factor == 1, setting.seed)
    assert reached == quantizers(converted).keys() - set(unreached)


def assert_restored(model: nn.Module, converted: nn.Module, inputs: Callable[[int], Any]) -> None:
    back = restore(converted)
    assert_same_everywhere(model, back, inputs, lambda m: nullcontext(), TYPICAL)
    modules = [list(m.named_modules(remove_duplicate=False)) for m in (back, model)]
    assert [(n, type(m)) for n, m in modules[0]] == [(n, type(m)) for n, m in modules[1]]
    assert [vars(m).keys() for _, m in modules[0]] == [vars(m).keys() for _, m in modules[1]]
    assert repr(back) == repr(model)
    assert list(back.state_dict()) == list(model.state_dict())
    assert set(converted.state_dict()) >= set(model.state_dict())


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    clone = torch.load(file, weights_only=False)
    assert isinstance(clone, nn.Module)
    return clone


def assert_copied(model: nn.Module, converted: nn.Module, inputs: Callable[[int], Any],
                  how: Callable[[nn.Module], nn.Module]) -> None:
    clone = how(copy.deepcopy(converted))
    assert isinstance(clone, type(model))
    assert conversion_of(clone) == conversion_of(converted)
    assert_same_everywhere(converted, clone, inputs, lambda m: nullcontext(), TYPICAL)
    assert_same_everywhere(model, clone, inputs, each=TYPICAL)


def assert_untouched(pair: Pair) -> None:
    """Check that the float model is unchanged and shares no storage with the converted one."""
    assert seen(pair.model) == pair.before
    storages = [{t.untyped_storage().data_ptr() for t in (*m.parameters(), *m.buffers())}
                for m in (pair.model, pair.converted)]
    assert not storages[0] & storages[1]
