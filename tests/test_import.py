"""Importing costs little, changes nothing, and needs no git."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import quantguard as qg


def python(code: str, **environment: str) -> str:
    """Run code in a new interpreter; return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_is_light_and_has_no_effects() -> None:
    code = """
import os, sys, warnings, logging, random
import torch
before = (dict(os.environ), list(warnings.filters), list(logging.root.handlers),
          random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads(),
          torch.is_grad_enabled(), torch.get_default_dtype())
import quantguard
assert before == (dict(os.environ), list(warnings.filters), list(logging.root.handlers),
                  random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads(),
                  torch.is_grad_enabled(), torch.get_default_dtype())
quantguard.Threat(), quantguard.SpecError
heavy = {"foolbox", "eagerpy", "torchvision", "sklearn", "timm", "click", "safetensors", "git",
         "scipy", "matplotlib"}
print(sorted(heavy & set(sys.modules)))
"""
    assert python(code).strip() == "[]"


def test_every_public_name_resolves_and_is_listed() -> None:
    assert len(set(qg.__all__)) == len(qg.__all__)
    for name in qg.__all__:
        value = getattr(qg, name)
        assert getattr(value, "__name__", name).rpartition(".")[2] == name
    assert dir(qg) == sorted(qg.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qg.nothing  # noqa: B018
    for name in qg.attacks.__all__:
        getattr(qg.attacks, name)
    assert qg.__version__[0].isdigit()


def test_every_public_callable_says_what_it_does() -> None:
    for name in qg.__all__:
        assert (getattr(qg, name).__doc__ or "").strip()


@pytest.mark.parametrize("before", [None, pytest.param("warn", marks=pytest.mark.slow)])
def test_foolbox_imports_without_git_and_the_environment_is_as_it_was(before: str | None,
                                                                      tmp_path: Path) -> None:
    code = """
import os
before = dict(os.environ)
import quantguard
quantguard.attacks.PGD()
assert dict(os.environ) == before, set(os.environ) ^ set(before)
print(os.environ.get("GIT_PYTHON_REFRESH"))
"""
    environment = {"PATH": str(tmp_path)}
    if before is not None:
        environment["GIT_PYTHON_REFRESH"] = before
    assert python(code, **environment).strip() == str(before)


def test_the_package_is_typed() -> None:
    assert (Path(qg.__file__).parent / "py.typed").is_file()
