"""Helpers that run the command line in tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from torch import Tensor

from quantguard.cli.main import main

Digits = tuple[Tensor, Tensor]
EVALUATE = ("--suite", "quick", "--images", "12", "--eps", "0.1")
HARDEN = ("--eps", "0.1", "--epochs", "1", "--set", "steps=1", "--set", "lr=1e-3")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def succeeds(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output or repr(result.exception)
    return result.output


def fails(*arguments: Any, code: int = 1) -> str:
    """Run a command that must end in one clear error; return its output."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code
    assert re.search(r"^Error: \S", result.output, re.MULTILINE), result.output
    assert "Traceback" not in result.output
    return result.output


def write_npz(path: Path, x: Any, y: Any, x_test: Any = None, y_test: Any = None) -> str:
    np.savez(path, x_train=x, y_train=y, x_test=x if x_test is None else x_test,
             y_test=y if y_test is None else y_test)
    return f"npz:{path}"
