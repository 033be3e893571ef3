"""Public functions accept tensors in any state and any context, and leave them unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from public_calls import THREAT, VERBS, Batches, Wrapped, evaluate
from torch import Tensor, nn

import quantguard as qg

pytestmark = pytest.mark.filterwarnings("ignore")


def _overwritten(x: Tensor) -> Tensor:
    x[:, :, 0] = 0
    return x


WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "normalises": lambda x: x.sub_(0.5), "relu": lambda x: F.relu(x, inplace=True),
    "item": _overwritten, "view": lambda x: x.flatten(1).mul_(0.9).view_as(x),
    "data": lambda x: x.data.mul_(0.9) * x}


@pytest.mark.parametrize(("verb", "name"), [
    pytest.param(verb, name, marks=[pytest.mark.slow] * (name != "normalises"))
    for verb in VERBS for name in WRITES])
def test_no_forward_changes_the_images_of_the_caller(verb: str, name: str, cnn: nn.Module,
                                                 batches: Batches) -> None:
    write = WRITES[name]
    before = copy.deepcopy(batches)
    with pytest.raises(qg.ConversionError, match="writes|be traced") if verb == "certify" else \
            nullcontext():
        VERBS[verb](Wrapped(cnn, lambda net, x: net(write(x))).eval(), batches)
    assert all(torch.equal(a, b) for one, two in zip(before, batches, strict=True)
               for a, b in zip(one, two, strict=True))


def test_a_forward_in_place_gets_the_same_result(cnn: nn.Module,
                                                               batches: Batches) -> None:
    one = evaluate(Wrapped(cnn, lambda net, x: net(x.mul_(0.9))).eval(), batches)
    two = evaluate(Wrapped(cnn, lambda net, x: net(x * 0.9)).eval(), batches)
    assert (one.survived == two.survived).all() and one.fidelity == two.fidelity


STATES: dict[str, Callable[[Tensor], Tensor]] = {
    "leaf": lambda x: x.clone().requires_grad_(),
    "result": lambda x: x.clone().requires_grad_() * 1,
    "inference": torch.inference_mode()(lambda x: x * 1)}


@pytest.mark.parametrize(("verb", "state"), [
    pytest.param(verb, state, marks=[pytest.mark.slow] * (state == "result"))
    for verb in VERBS for state in STATES])
def test_images_are_accepted_in_any_state(verb: str, state: str, cnn: nn.Module,
                                          batches: Batches) -> None:
    loader = [(STATES[state](x), y * 1) for x, y in batches]
    VERBS[verb](cnn, loader)
    assert all(x.grad is None for x, _ in loader if x.is_leaf)


@pytest.mark.parametrize(("verb", "at"), [
    (verb, at) for verb in VERBS for at in (0, 1)
    if at == 0 or verb not in ("inspect", "convert example")])  # these take no labels
def test_tensors_without_values_are_refused(verb: str, at: int, cnn: nn.Module,
                                             batches: Batches) -> None:
    loader = [tuple(t.to("meta") if i == at else t for i, t in enumerate(b)) for b in batches]
    with pytest.raises(qg.DataError, match="on the meta device"):
        VERBS[verb](cnn, loader)


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "inspect"])
@pytest.mark.parametrize("layer", ["", "0"], ids=["all", "one layer"])
def test_models_without_values_are_refused(verb: str, layer: str, cnn: nn.Module,
                                            batches: Batches) -> None:
    model = copy.deepcopy(cnn)
    model.get_submodule(layer).to("meta")
    with pytest.raises(qg.ConversionError, match="on the meta device"):
        VERBS[verb](model, batches)


def test_no_model_is_moved_to_the_meta_device(cnn: nn.Module, batches: Batches) -> None:
    for verb in (qg.evaluate, qg.certify, qg.harden):
        with pytest.raises(qg.SpecError, match="device 'meta'"):
            verb(cnn, batches, THREAT, device="meta", progress=False)  # type: ignore[operator]
    assert not any(p.is_meta for p in cnn.parameters())


@pytest.mark.parametrize("context", [
    torch.inference_mode, pytest.param(torch.no_grad, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verb", VERBS)
def test_gradients_are_enabled_inside_of_every_call(
        verb: str, context: Any, cnn: nn.Module, batches: Batches) -> None:
    plain = VERBS[verb](cnn, batches)
    with context():
        found = VERBS[verb](cnn, [(x * 1, y * 1) for x, y in batches])
    if isinstance(found, nn.Module):
        one, two = plain.state_dict(), found.state_dict()
        assert all(torch.equal(one[k], two[k]) and not two[k].is_inference() for k in one)
        assert [p.requires_grad for p in found.parameters()] == \
            [p.requires_grad for p in plain.parameters()]
    elif isinstance(found, qg.Evaluation):
        assert (found.survived == plain.survived).all()


@pytest.mark.parametrize("verb", VERBS)
def test_models_made_in_inference_mode_give_the_same_results(verb: str, cnn: nn.Module,
                                                        batches: Batches) -> None:
    with torch.inference_mode():
        model = copy.deepcopy(cnn)
    assert next(model.parameters()).is_inference()
    found = VERBS[verb](model, batches)
    if isinstance(found, qg.Evaluation):
        assert (found.survived == evaluate(cnn, batches).survived).all()
    assert next(model.parameters()).is_inference()
