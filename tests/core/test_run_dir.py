"""Run directories: files are written completely or not at all, and one run uses them at a time."""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.attacks import PGD
from quantguard.core import run_dir
from quantguard.core.distributed import Distributed
from quantguard.core.errors import LoadError, SpecError, WriteError
from quantguard.core.file_io import replacing, write_text
from quantguard.core.run_dir import RunDir, locked
from quantguard.training.recipes import Recipe

CPU = torch.device("cpu")
STATE: dict[str, Any] = {"model": {"weight": torch.arange(6.0)}, "shards": 1}


def opened(path: Path) -> RunDir:
    directory = RunDir(path, {"epochs": 2})
    directory.read(CPU)
    return directory


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@pytest.fixture
def no_space() -> Iterator[None]:
    """No file may grow beyond 10 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_without_space_the_older_files_are_unchanged(
        tmp_path: Path, request: pytest.FixtureRequest) -> None:
    directory = opened(tmp_path)
    directory.write(STATE, [{"epoch": 0}], {})
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    request.getfixturevalue("no_space")
    with pytest.raises(WriteError, match=r"training.pt cannot be written\nFile too l") as caught:
        directory.write({"model": torch.zeros(100_000)}, [{"epoch": 0}, {"epoch": 1}], {})
    assert isinstance(caught.value, OSError) and caught.value.fix
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


@pytest.mark.usefixtures("no_space")
def test_a_text_file_without_space_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"a.json cannot be written\nFile too large"):
        write_text(tmp_path / "a.json", "x" * 100_000)
    with pytest.raises(WriteError, match=r"no/a.json cannot be written\nNo such file"):
        write_text(tmp_path / "no" / "a.json", "")
    assert not os.listdir(tmp_path)


def test_other_errors_while_writing_are_no_write_errors(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="other") as caught, replacing(tmp_path / "a"):
        raise RuntimeError("other")
    assert not isinstance(caught.value, WriteError)


def flipped(content: bytes) -> bytes:
    """Return content with one flipped bit in a weight, which torch.load does not notice."""
    place = content.index(STATE["model"]["weight"].numpy().tobytes()) + 7
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def saved(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize("damage", [
    flipped, lambda content: content[: len(content) // 2], lambda content: content[:-1],
    lambda content: b"", lambda content: b"garbage", lambda content: b"x" * 5000,
    lambda content: saved({"weight": torch.zeros(2)}),
    lambda content: saved({"settings": {"epochs": 2}})],
    ids=["flipped", "half", "last byte", "empty", "garbage", "longer", "another", "no model"])
def test_a_damaged_state_is_refused(damage: Callable[[bytes], bytes],
                                                      tmp_path: Path) -> None:
    opened(tmp_path).write(STATE, [], {})
    file = tmp_path / "training.pt"
    state = RunDir(tmp_path, {"epochs": 2}).read(CPU)
    assert state is not None and torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(LoadError, match="training.pt is damaged(.|\n)*Delete it, or use another"):
        RunDir(tmp_path, {"epochs": 2}).read(CPU)
    file.unlink()
    assert RunDir(tmp_path, {"epochs": 2}).read(CPU) is None


@pytest.mark.parametrize("damage", [
    lambda content: content[: len(content) // 2], lambda content: b"",
    lambda content: content[:90] + bytes([content[90] ^ 1]) + content[91:]],
    ids=["half", "empty", "flipped"])
def test_damaged_files_of_evaluation_and_certification_are_refused(
        damage: Callable[[bytes], bytes], tmp_path: Path, cnn: nn.Module,
        train_digits: TensorDataset) -> None:
    loader = DataLoader(TensorDataset(*(t[:20] for t in train_digits.tensors)), batch_size=20)
    for verb, options, name in ((qg.evaluate, {"suite": [PGD("ce", 1)]}, "evaluation.npz"),
                                (qg.certify, {"method": "ibp"}, "certificate.npz")):
        verb(cnn, loader, run_dir=tmp_path, progress=False, **options)
        (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
        with pytest.raises(LoadError, match=f"{name} is damaged(.|\n)*Delete it, or use another"):
            verb(cnn, loader, run_dir=tmp_path, progress=False, **options)


# --- one run at a time ---

LOCK = """
import sys, time
from quantguard.core.run_dir import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs in tmp_path / "run"."""
    process = subprocess.Popen([sys.executable, "-c", LOCK, str(tmp_path / "run")], text=True,
                               stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_until_the_first_ends(
        other_run: subprocess.Popen[str], tmp_path: Path, cnn: nn.Module,
        train_digits: TensorDataset) -> None:
    loader = DataLoader(TensorDataset(*(t[:60] for t in train_digits.tensors)), batch_size=30)
    fast = Recipe("pgd", steps=1, lr=1e-3)
    begun = tmp_path / "run" / ".training.pt.1.pt"
    begun.write_text("a partial file of the other run")
    for verb, options in ((qg.harden, {"recipe": fast, "epochs": 1}), (qg.certify, {}),
                          (qg.evaluate, {"suite": [PGD("ce", 1)]})):
        with pytest.raises(SpecError, match="another run is under way in .*run\n.*use another"):
            verb(cnn, loader, run_dir=tmp_path / "run", progress=False, **options)
    assert begun.exists()
    other_run.kill()
    other_run.wait()
    qg.harden(cnn, loader, run_dir=tmp_path / "run", progress=False, recipe=fast, epochs=1)
    assert names(tmp_path / "run") == [".lock", "metrics.jsonl", "run.json", "training.pt"]


def test_the_directory_is_unlocked_after_a_run_or_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    context = multiprocessing.get_context("fork")
    with locked(tmp_path):
        # a worker of a loader may outlive the run
        worker = context.Process(target=time.sleep, args=(60,))
        worker.start()
    try:
        assert subprocess.run([sys.executable, "-c", LOCK.replace("60", "0"), str(tmp_path)],
                              check=True, capture_output=True).stdout == b"locked\n"
    finally:
        worker.kill()
        worker.join()


@pytest.mark.parametrize("where", ["file", "file/under", "/proc/none"])
def test_paths_that_cannot_be_a_run_directory(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = rf"{where} cannot be a run directory\n.+\.\nName another"
    with pytest.raises(SpecError, match=message), locked(tmp_path / where):
        pass


def test_the_main_process_locks_for_all_processes(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "distributed", lambda: Distributed(1, 2))
    monkeypatch.setattr(Distributed, "agreed", lambda self, value: False)
    with locked(tmp_path / "run"):
        assert not names(tmp_path / "run")
    monkeypatch.setattr(Distributed, "agreed", lambda self, value: True)  # main was refused
    with pytest.raises(SpecError, match="another run"), locked(tmp_path / "run"):
        pass
