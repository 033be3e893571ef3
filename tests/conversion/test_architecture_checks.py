"""The checks of converted architectures fail on broken conversions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from architecture_families import RGB
from close_models import Close, over_close
from converted_pairs import Pair, assert_identical, images
from timm.layers import DropPath
from torch import nn

from quantguard.conversion.audit import audit
from quantguard.conversion.converter import conversion_of


def another_function(model: nn.Module, close: Close) -> None:
    model.get_submodule(close.activation).__dict__["function"] = nn.Softsign()


def never_bypassed(model: nn.Module, close: Close) -> None:
    module = model.get_submodule(close.activation)
    module.__dict__["_float"] = lambda x: x.round()


def one_mode_only(model: nn.Module, close: Close) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.BatchNorm2d, DropPath)):
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]


def moved_weight(model: nn.Module, close: Close) -> None:
    weight = model.get_submodule(close.leaf).weight
    with torch.no_grad():
        weight.view(-1)[:1].add_(0.01)


def cut_gradient(model: nn.Module, close: Close) -> None:
    model.get_submodule(close.activation).register_forward_hook(
        lambda module, args, y: y.detach() + (y - y.detach()) * 0.5)


BREAKS = (another_function, never_bypassed, one_mode_only, moved_weight, cut_gradient)


@over_close
@pytest.mark.parametrize("damage", BREAKS)
def test_a_broken_conversion_fails_the_identity_check(
        close: Close, damage: Callable[[nn.Module, Close], None],
        close_pairs: dict[Close, Pair]) -> None:
    pair = close_pairs[close]
    broken = copy.deepcopy(pair.converted)
    damage(broken, close)
    with pytest.raises(AssertionError):
        assert_identical(replace(pair, converted=broken))


@over_close
def test_the_audit_detects_another_function(close: Close, close_pairs: dict[Close, Pair]) -> None:
    """Also in torch's encoder layers, whose fused path calls no activation module."""
    pair, x = close_pairs[close], images(RGB, 1)
    done, broken = conversion_of(pair.converted), copy.deepcopy(pair.converted)
    assert done is not None and done.audit is not None and done.audit.identical
    another_function(broken, close)
    assert not audit(copy.deepcopy(pair.model), broken, done.plan, x).identical
