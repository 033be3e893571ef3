"""Two processes against one: training speed, and accuracy with BatchNorm.

    pip install '.[accelerate]'
    python benchmarks/scaling.py [--seeds 5] [--repeats 3]

Speed: `harden`, recipe `pgd`, of a LeNet on random images, batches of 128. One process with one
thread, one process with two threads, and two processes (torchrun, gloo) with one thread each. Wall
seconds of training alone, medians of interleaved repeats. This needs two idle cores.

BatchNorm sees each process's shard of a batch. A small CNN with BatchNorm is trained on
scikit-learn's digits (`pgd`, Linf eps 0.1, 6 epochs, batches of 64) by one process and by two, from
several seeds. Mean and 95 % t interval of the paired difference, of clean accuracy and of accuracy
under PGD-20, on 397 test images.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from fashion_lenet import lenet
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.attacks import PGD
from quantguard.core.distributed import distributed
from quantguard.core.file_io import write_text
from quantguard.data.loader import load_data

HERE = Path(__file__).parent / "results"
WAYS = {"one process, one thread": (1, 1), "one process, two threads": (1, 2),
        "two processes, one thread each": (2, 1)}
BATCHES = 16


def timed() -> dict[str, Any]:
    """Train a LeNet once to compile, and once to be timed."""
    x, y = torch.rand(128 * BATCHES, 1, 28, 28), torch.randint(0, 10, (128 * BATCHES,))
    loader = DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True)
    recipe, val = qg.Recipe("pgd", lr=1e-3), [(x[:2], y[:2])]
    for _ in range(2):
        model = qg.convert(lenet(), 2, dynamic=True)  # takes no time for calibration
        begin = time.monotonic()
        qg.harden(model, loader, qg.Threat(eps=0.1), recipe=recipe, epochs=1, val=val,
                  progress=False)
        seconds = time.monotonic() - begin
    return {"seconds": seconds, "images": len(x)}


def with_batchnorm(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, 1, 1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10))
    threat = qg.Threat(eps=0.1)
    hardened = qg.harden(model, load_data("digits", "train", batch_size=64), threat, seed=seed,
                         recipe=qg.Recipe("pgd", lr=5e-3), epochs=6, progress=False)
    found = qg.evaluate(hardened, load_data("digits", "test"), threat, suite=[
        PGD("ce", 20, sharpness=(2, 16))], progress=False)
    return {"clean": found.clean_accuracy, "attacked": found.robust_accuracy,
            "images": found.images}


def launched(processes: int, threads: int, *arguments: str) -> dict[str, Any]:
    """Run this file's worker in several processes; return the result of the first."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] \
        if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        subprocess.run([sys.executable, *several, __file__, "--out", str(out), *arguments],
                       env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=True,
                       stderr=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--speed-only", action="store_true", help="keep what is known of BatchNorm")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        found = timed() if args.seed is None else with_batchnorm(args.seed)
        if distributed().is_main:
            write_text(args.out, json.dumps(found))
        return
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(args.repeats):
        for name, (processes, threads) in WAYS.items():
            seconds[name].append(launched(processes, threads)["seconds"])
    one = statistics.median(seconds["one process, one thread"])
    for name, took in seconds.items():
        middle = statistics.median(took)
        print(f"{name:32} {128 * BATCHES / middle:6.0f} images/s  {one / middle:.2f} times one",
              flush=True)
    target = HERE / "scaling.json"
    rows = json.loads(target.read_text())["batchnorm"] if args.speed_only else []
    for seed in range(0 if args.speed_only else args.seeds):
        row = {str(n): launched(n, 1, "--seed", str(seed)) for n in (1, 2)}
        rows.append(row)
        print(f"BatchNorm, seed {seed}: " + "; ".join(
            f"{n} processes: clean {r['clean']:.1%}, attacked {r['attacked']:.1%}"
            for n, r in row.items()), flush=True)
    differences = {}
    for kind in ("clean", "attacked"):
        apart = [100 * (row["2"][kind] - row["1"][kind]) for row in rows]
        mean, half = statistics.mean(apart), float(stats.t.ppf(0.975, len(apart) - 1)) * (
            statistics.stdev(apart) / len(apart) ** 0.5)
        differences[kind] = [mean, half]
        print(f"two processes minus one, {kind}: {mean:+.2f} +- {half:.2f} points")
    write_text(target, json.dumps({
        "seconds": seconds, "images": 128 * BATCHES, "batchnorm": rows,
        "differences": differences, "cores": os.cpu_count(), "machine": platform.machine(),
        "python": platform.python_version(),
        **{p: version(p) for p in ("torch", "accelerate")}}))


if __name__ == "__main__":
    main()
