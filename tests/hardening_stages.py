"""Helpers of the tests that harden in stages."""

from __future__ import annotations

from typing import Any

from fine_tuning import THREAT
from torch import nn

from quantguard.training.hardening import Hardened, hardened
from quantguard.training.recipes import Recipe

FAST = Recipe("pgd", steps=2, lr=1e-3)


def staged(model: nn.Module, loader: Any, **options: Any) -> Hardened:
    """Harden a model with quick settings, and return the results of all stages."""
    options = {"bits": 2, "dynamic": True, "recipe": FAST, "epochs": 2, "train": "all", "val": None,
               "run_dir": None, "seed": 0, "device": None, "progress": False, **options}
    return hardened(model, loader, THREAT, **options)
