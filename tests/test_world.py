"""Several processes give what one gives: the same weights, the same masks."""

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
from quantguard.batching import SeededBatches, hold_out
from quantguard.world import World, world

TRAIN = """
import sys, torch
from torch import nn
import quantguard as qg
from quantguard.data import load_data
from quantguard.training import fit
from quantguard.batches import unpack
from torch.utils.data import DataLoader, TensorDataset
torch.set_num_threads(1)
(out,) = sys.argv[1:]
whole = load_data("digits", "train", batch_size=32).dataset
x, y = next(iter(DataLoader(whole, batch_size=1000)))
loader = DataLoader(TensorDataset(x.double(), y), batch_size=20)
from quantguard.world import world
for recipe in ("clean", "pgd"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
                          nn.Linear(256, 10)).double()
    settings = qg.Recipe(recipe, lr=None if recipe == "clean" else 1e-3, ema=0.9)
    fit(model, loader, qg.Threat(eps=0.1), settings, epochs=1, seed=3, progress=False)
    torch.save(model.state_dict(), f"{out}-{recipe}-{world().rank}-of-{world().size}.pt")
"""
RESUME = """
import sys, torch
from torch.utils.data import DataLoader, TensorDataset
import quantguard as qg
from quantguard.data import load_data
from quantguard.demo import small_cnn
from quantguard.errors import Interrupted
from quantguard.gradients import Gradients
from quantguard.world import world
torch.set_num_threads(1)
out, run_dir, at = sys.argv[1:]
whole = load_data("digits", "train", batch_size=32).dataset
x, y = next(iter(DataLoader(whole, batch_size=400)))
calls, compute = 0, Gradients.__call__
def counted(self, *args):
    global calls
    calls += 1
    if calls == int(at):
        raise KeyboardInterrupt
    return compute(self, *args)
Gradients.__call__ = counted
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
    torch.save(made.state_dict(), f"{out}-{world().rank}.pt")
"""
EVALUATE = """
import sys, torch, numpy as np
import quantguard as qg
from quantguard.attacks import PGD, CarliniWagner, Square, Substitute
from quantguard.data import load_data
torch.set_num_threads(1)
out, path = sys.argv[1:]
loader = load_data("digits", "test", batch_size=64)
suite = [PGD("ce", 10, twin=(2, 16)), Square(30), CarliniWagner(2, 5),
         Substitute(steps=5, rounds=1)]
result = qg.evaluate(qg.load(path), loader, qg.Threat(eps=0.1), suite=suite, images=150,
                     progress=False)
from quantguard.world import world
result.save(f"{out}-{world().rank}-of-{world().size}.json")
np.save(f"{out}-{world().rank}-of-{world().size}.npy", result.adversarials)
"""


def launched(script: Path, processes: int, *arguments: str) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    env |= {"OMP_NUM_THREADS": "1"}
    # what `accelerate launch` starts under itself; it alone starts one process on a CPU
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] \
        if processes > 1 else []
    done = subprocess.run([sys.executable, *several, str(script), *arguments], env=env,
                          capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """50 steps, float64, no BatchNorm: equal to 1e-5."""
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
def test_two_processes_that_are_stopped_go_on_to_the_same_bits(tmp_path: Path) -> None:
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
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["finished"]


@pytest.mark.slow
def test_two_processes_find_the_masks_that_one_finds(quantized: torch.nn.Module,
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


def test_alone_nothing_is_asked_of_anybody() -> None:
    here = world()
    assert here == World() and here.first and here.part([1, 2, 3]) == [1, 2, 3]
    rows, mine = np.arange(3.0), np.zeros(3, dtype=bool)
    assert here.joined(rows, mine) is rows and here.total_of(2.5) == 2.5
    assert here.agreed("a") == "a"


def test_parts_are_disjoint_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    for rank in range(3):
        monkeypatch.setattr("quantguard.batching.world", lambda rank=rank: World(rank, 3))
        parts.append(list(SeededBatches(25, 10, seed=0)))
    monkeypatch.setattr("quantguard.batching.world", lambda: World())
    whole = list(SeededBatches(25, 10, seed=0))
    assert [len(batches) for batches in parts] == [3, 3, 3]
    for number, batch in enumerate(whole):
        assert sorted(i for batches in parts for i in batches[number]) == sorted(batch)


def test_every_process_calibrates_on_the_same_whole_batches(
        monkeypatch: pytest.MonkeyPatch) -> None:
    loader = DataLoader(TensorDataset(torch.arange(100)), batch_size=10)
    found = []
    for rank in range(2):
        monkeypatch.setattr("quantguard.batching.world", lambda rank=rank: World(rank, 2))
        found.append([batch[0].tolist() for batch in hold_out(loader, None, None, 0).whole()])
    assert found[0] == found[1] and all(len(batch) == 10 for batch in found[0])
