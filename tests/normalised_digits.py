"""Digits with mean and std, quick settings for them, and calls of the command line."""

from __future__ import annotations

import copy
from typing import Any

import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

import quantguard as qg
from quantguard.attacks import PGD
from quantguard.cli.main import main

Digits = tuple[Tensor, Tensor]
MEAN, STD = 0.3, 0.4
OWN = qg.Threat(eps=0.05, mean=MEAN, std=STD)
QUICK: dict[str, Any] = {"suite": [PGD("ce", 2)], "progress": False, "images": 40}
TRAIN = ("--epochs", "1", "--set", "steps=1", "--set", "lr=1e-3")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def succeeds(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output or repr(result.exception)
    return result.output


def fails(*arguments: Any) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1, result.output
    assert "Error: " in result.output and "Traceback" not in result.output
    return result.output


def right(model: nn.Module, loader: list[Digits], rows: Any = slice(None)) -> int:
    """Return how many images a plain forward classifies correctly, as an independent check."""
    x, y = loader[0]
    with torch.no_grad():
        return int((copy.deepcopy(model).eval()(x[rows]).argmax(1) == y[rows]).sum())
