"""Settings and helpers of the tests of harden, compare and ablate."""

from __future__ import annotations

from typing import Any

import torch
from fine_tuning import FAST, THREAT
from torch import nn

import quantguard as qg
from quantguard.attacks import PGD


def hardened(model: nn.Module, loader: Any, **options: Any) -> nn.Module:
    options = {"epochs": 1, "recipe": FAST, "progress": False, **options}
    return qg.harden(model, loader, options.pop("threat", THREAT), **options)


def same_state(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


SUITE = [PGD("ce", 4), PGD("margin", 6, sharpness=(2, 16))]
