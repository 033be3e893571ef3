"""Several processes compute the same weights and the same masks as one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.core.distributed import Distributed, distributed
from quantguard.data.train_batches import SeededBatches, hold_out

TRAIN = """
import sys, torch
from torch import nn
import quantguard as qg
from quantguard.data.loader import load_data
from quantguard.training.trainer import fit
from quantguard.data.batches import unpack
from torch.utils.data import DataLoader, TensorDataset
torch.set_num_threads(1)
(out,) = sys.argv[1:]
whole = load_data("digits", "train", batch_size=32).dataset
x, y = next(iter(DataLoader(whole, batch_size=1000)))
loader = DataLoader(TensorDataset(x.double(), y), batch_size=20)
from quantguard.core.distributed import distributed
for recipe in ("clean", "pgd"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
                          nn.Linear(256, 10)).double()
    settings = qg.Recipe(recipe, lr=None if recipe == "clean" else 1e-3, ema=0.9)
    fit(model, loader, qg.Threat(eps=0.1), settings, epochs=1, seed=3, progress=False)
    here = distributed()
    torch.save(model.state_dict(), f"{out}-{recipe}-{here.rank}-of-{here.size}.pt")
"""
RESUME = """
import sys, torch
from torch.utils.data import DataLoader, TensorDataset
import quantguard as qg
from quantguard.data.loader import load_data
from quantguard.cli.demo import small_cnn
from quantguard.core.errors import Interrupted
from quantguard.training.train_step import TrainStep
from quantguard.core.distributed import distributed
torch.set_num_threads(1)
out, run_dir, at = sys.argv[1:]
whole = load_data("digits", "train", batch_size=32).dataset
x, y = next(iter(DataLoader(whole, batch_size=400)))
calls, compute = 0, TrainStep.__call__
def counted(self, *args):
    global calls
    calls += 1
    if calls == int(at):
        raise KeyboardInterrupt
    return compute(self, *args)
TrainStep.__call__ = counted
torch.manual_seed(0)
model = small_cnn()
recipe = qg.Recipe("pgd", steps=1, batch_size=50)
try:
    made = qg.harden(model, DataLoader(TensorDataset(x, y), batch_size=50), qg.Threat(eps=0.1),
                     recipe=recipe, epochs=2, seed=3, progress=False,
                     run_dir=None if run_dir == "none" else run_dir)
except Interrupted as error:
    assert "saved in" in str(error)
else:
    torch.save(made.state_dict(), f"{out}-{distributed().rank}.pt")
"""
EVALUATE = """
import sys, torch, numpy as np
import quantguard as qg
from quantguard.attacks import PGD, CarliniWagner, Square, Substitute
from quantguard.data.loader import load_data
torch.set_num_threads(1)
out, path = sys.argv[1:]
loader = load_data("digits", "test", batch_size=64)
suite = [PGD("ce", 10, sharpness=(2, 16)), Square(30), CarliniWagner(2, 5),
         Substitute(steps=5, rounds=1)]
result = qg.evaluate(qg.load(path), loader, qg.Threat(eps=0.1), suite=suite, images=150,
                     progress=False)
from quantguard.core.distributed import distributed
result.save(f"{out}-{distributed().rank}-of-{distributed().size}.json")
np.save(f"{out}-{distributed().rank}-of-{distributed().size}.npy", result.adversarials)
"""


def launched(script: Path, processes: int, *arguments: str) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    env |= {"OMP_NUM_THREADS": "1"}
    # `accelerate launch` uses this, but alone starts only one process on a CPU
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] \
        if processes > 1 else []
    done = subprocess.run([sys.executable, *several, str(script), *arguments], env=env,
                          capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_train_the_same_weights_as_one(tmp_path: Path) -> None:
    """After 50 steps in float64 without BatchNorm, equal to 1e-5."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    for processes in (1, 2):
        launched(script, processes, str(tmp_path / "model"))
    for recipe in ("clean", "pgd"):
        one = torch.load(tmp_path / f"model-{recipe}-0-of-1.pt")
        two = [torch.load(tmp_path / f"model-{recipe}-{rank}-of-2.pt") for rank in (0, 1)]
        for name, value in one.items():
            assert value.dtype == torch.float64
            assert torch.equal(two[0][name], two[1][name])
            assert float((value - two[0][name]).abs().max()) < 1e-5


@pytest.mark.slow
def test_two_stopped_processes_resume_to_the_same_bits(tmp_path: Path) -> None:
    script = tmp_path / "resume.py"
    script.write_text(RESUME)
    launched(script, 2, str(tmp_path / "whole"), "none", "0")
    for stop in (4, 6):  # in the first epoch, and in the second
        launched(script, 2, str(tmp_path / "resumed"), str(tmp_path / "run"), str(stop))
        assert not list(tmp_path.glob("resumed*"))
    launched(script, 2, str(tmp_path / "resumed"), str(tmp_path / "run"), "0")
    one = torch.load(tmp_path / "whole-0.pt")
    for rank in (0, 1):
        two = torch.load(tmp_path / f"resumed-{rank}.pt")
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"]


@pytest.mark.slow
def test_two_processes_find_the_same_masks_as_one(quantized: torch.nn.Module,
                                                     tmp_path: Path) -> None:
    script = tmp_path / "evaluate.py"
    script.write_text(EVALUATE)
    qg.save(quantized, tmp_path / "model.qg")
    for processes in (1, 2):
        launched(script, processes, str(tmp_path / "found"), str(tmp_path / "model.qg"))
    one = json.loads((tmp_path / "found-0-of-1.json").read_text())
    for rank in (0, 1):
        two = json.loads((tmp_path / f"found-{rank}-of-2.json").read_text())
        for name in ("survived_images", "correct_images", "flags", "curve"):
            assert two[name] == one[name], name
        for mine, theirs in zip(one["attacks"], two["attacks"], strict=True):
            mine.pop("seconds", None), theirs.pop("seconds")
            assert mine == theirs
        assert np.array_equal(np.load(tmp_path / f"found-{rank}-of-2.npy"),
                              np.load(tmp_path / "found-0-of-1.npy"))


def test_a_single_process_does_not_communicate() -> None:
    here = distributed()
    assert here == Distributed() and here.is_main and here.shard([1, 2, 3]) == [1, 2, 3]
    rows, mine = np.arange(3.0), np.zeros(3, dtype=bool)
    assert here.joined(rows, mine) is rows and here.total_of(2.5) == 2.5
    assert here.agreed("a") == "a"


def test_shards_are_disjoint_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = []
    for rank in range(3):
        monkeypatch.setattr(
            "quantguard.data.train_batches.distributed", lambda rank=rank: Distributed(rank, 3)
        )
        shards.append(list(SeededBatches(25, 10, seed=0)))
    monkeypatch.setattr("quantguard.data.train_batches.distributed", lambda: Distributed())
    whole = list(SeededBatches(25, 10, seed=0))
    assert [len(batches) for batches in shards] == [3, 3, 3]
    for number, batch in enumerate(whole):
        assert sorted(i for batches in shards for i in batches[number]) == sorted(batch)


def test_every_process_calibrates_on_the_same_whole_batches(
        monkeypatch: pytest.MonkeyPatch) -> None:
    loader = DataLoader(TensorDataset(torch.arange(100)), batch_size=10)
    found = []
    for rank in range(2):
        monkeypatch.setattr(
            "quantguard.data.train_batches.distributed", lambda rank=rank: Distributed(rank, 2)
        )
        found.append([batch[0].tolist() for batch in hold_out(loader, None, None, 0).whole()])
    assert found[0] == found[1] and all(len(batch) == 10 for batch in found[0])
