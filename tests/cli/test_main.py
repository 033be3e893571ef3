"""The group of verbs: help, version, exit codes, errors."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from command_line import EVALUATE, HARDEN, fails, succeeds

from quantguard.cli import arguments as cli_arguments
from quantguard.core import progress


@pytest.mark.slow
def test_quiet_prints_no_progress(model: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LOG_EVERY", 0.0)
    for arguments in (("evaluate", model, "--data", data, *EVALUATE),
                      ("compare", model, "--data", data, *EVALUATE),
                      ("harden", model, "--data", data, *HARDEN, "--force"),
                      ("ablate", model, "--data", data, *HARDEN, *EVALUATE)):
        loud, quiet = succeeds(*arguments), succeeds(*arguments, "--quiet")
        assert len(re.findall(r"^(?:harden|evaluate).*:", loud, re.MULTILINE)) > 2
        assert not re.search(r"^(harden|evaluate|\[\d/\d\]|resumed)", quiet, re.MULTILINE)
        assert set(quiet.splitlines()) <= set(loud.splitlines())


def test_version_and_help() -> None:
    assert succeeds("--version").startswith("quantguard, version ")
    text = succeeds("--help")
    for verb in ("inspect", "convert", "harden", "evaluate", "compare", "ablate", "demo"):
        assert verb in text
        assert "Usage:" in succeeds(verb, "-h")


def test_as_a_process(model: str) -> None:
    """In a real process: standard output, standard error and exit codes."""
    def process(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "quantguard", *arguments], text=True,
                              capture_output=True, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})

    good = process("convert", model)
    assert good.returncode == 0 and "4 of 4 activations converted" in good.stdout
    assert good.stderr == ""
    bad = process("evaluate", "missing.pt", "--data", "digits")
    assert bad.returncode == 1 and bad.stdout == ""
    assert bad.stderr.startswith("Error: missing.pt does not exist\n")


def test_a_system_error_without_a_file_name_is_printed_without_one(model: str,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(cli_arguments, "load_model", fail)
    assert fails("inspect", model) == "Error: File too large\n"


@pytest.mark.parametrize("verb", ["harden", "evaluate", "compare", "ablate", "sensitivity", "demo"])
@pytest.mark.parametrize("seed", ["-1", str(1 << 32)])
def test_a_seed_has_32_bits(verb: str, seed: str, model: str) -> None:
    more = () if verb == "demo" else (model, "--data", "digits")
    assert "0<=x<=4294967295" in fails(verb, *more, "--seed", seed, code=2)
