"""What a run directory keeps: written whole or not at all."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quantguard.errors import WriteError
from quantguard.files import replacing, write_text
from quantguard.keeping import RunDir

CPU = torch.device("cpu")
STATE = {"model": {"weight": torch.arange(6.0)}, "parts": 1}


def opened(path: Path) -> RunDir:
    directory = RunDir(path, {"epochs": 2})
    directory.read(CPU)
    return directory


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@pytest.fixture
def no_room() -> Iterator[None]:
    """No file may grow beyond 10 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_without_room_what_was_kept_is_kept_and_nothing_else(
        tmp_path: Path, request: pytest.FixtureRequest) -> None:
    directory = opened(tmp_path)
    directory.write(STATE, [{"epoch": 0}])
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    request.getfixturevalue("no_room")
    with pytest.raises(WriteError, match=r"training.pt cannot be written\nFile too l") as caught:
        directory.write({"model": torch.zeros(100_000)}, [{"epoch": 0}, {"epoch": 1}])
    assert isinstance(caught.value, OSError) and caught.value.fix
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


@pytest.mark.usefixtures("no_room")
def test_a_text_without_room_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"a.json cannot be written\nFile too large"):
        write_text(tmp_path / "a.json", "x" * 100_000)
    with pytest.raises(WriteError, match=r"no/a.json cannot be written\nNo such file"):
        write_text(tmp_path / "no" / "a.json", "")
    assert not os.listdir(tmp_path)


def test_what_goes_wrong_otherwise_while_writing_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="other") as caught, replacing(tmp_path / "a"):
        raise RuntimeError("other")
    assert not isinstance(caught.value, WriteError)
