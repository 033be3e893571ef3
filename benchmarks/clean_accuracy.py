"""Clean accuracy that low-bit activations cost, and that learned thresholds regain.

A CNN with BatchNorm on Fashion-MNIST, 5 seeds, the whole test set. Four tables:

1. right after conversion, without any fine-tune: thresholds placed without data (BatchNorm
   statistics), and from 8 batches of training images;
2. `harden(recipe="clean")` with all weights trained, beside float with the same epochs;
3. `train="thresholds"`: weights and BatchNorm frozen. A fixed quantizer has nothing to train, so
   its row is the converted model; both start from the same calibration;
4. float and 2 bits dynamic with more epochs: a network that is not fitted yet is behind.

    python benchmarks/clean_accuracy.py --seeds 0 1 2 3 4      # missing seeds, then the tables
    python benchmarks/clean_accuracy.py --table-only

Each seed writes its own JSON when it is done and resumes after an interruption.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from torch import nn

import quantguard as qg
from quantguard.cli.demo import train_clean
from quantguard.core.file_io import write_text
from quantguard.core.specs import QuantSpec
from quantguard.data.loader import load_data

HERE = Path(__file__).parent / "results" / "clean_accuracy"
START_BITS, TRAIN_BITS, LEARN_BITS = (8, 6, 5, 4, 3, 2), (1, 2, 3, 4), (2, 3, 4)
PARENT_EPOCHS, EPOCHS, MORE_EPOCHS = 5, 3, 8


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(576, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 10))


def right(model: nn.Module) -> int:
    """Return the number of test images that model gets right."""
    model.eval()
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum())
                   for x, y in load_data("fashion-mnist", "test", batch_size=500))


def parent(seed: int, train: Any) -> nn.Module:
    path = HERE / "work" / f"parent-{seed}.qg"
    if path.exists():
        return qg.load(path)
    torch.manual_seed(seed)
    model = cnn()
    train_clean(model, train, PARENT_EPOCHS)
    path.parent.mkdir(parents=True, exist_ok=True)
    qg.save(model, path)
    return model


def cells(seed: int) -> dict[str, int]:
    """Return how many test images each model gets right; finished ones come from a work file."""
    train = load_data("fashion-mnist", "train", batch_size=128)
    float_model = parent(seed, train)
    few = list(itertools.islice(train, 8))
    path = HERE / "work" / f"cells-{seed}.json"
    done: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}

    def cell(name: str, make: Any) -> None:
        if name not in done:
            done[name] = right(make())
            write_text(path, json.dumps(done))
            print(f"seed {seed}: {name}: {done[name] / 100:.2f} %", flush=True)

    def harden(model: nn.Module, name: str, epochs: int = EPOCHS, **options: Any) -> nn.Module:
        recipe = qg.Recipe("clean")
        return qg.harden(model, train, recipe=recipe, epochs=epochs, seed=seed,
                         run_dir=HERE / "work" / f"{name}-{seed}", **options)

    cell("float", lambda: float_model)
    for bits, data in itertools.product(START_BITS, (None, few)):
        cell(f"start/{bits}/{'data' if data else 'statistics'}",
             lambda bits=bits, data=data: qg.convert(float_model, bits, data=data))
    cell("trained/float", lambda: harden(float_model, "float", bits=32))
    for bits, dynamic in itertools.product(TRAIN_BITS, (False, True)):
        kind = "dynamic" if dynamic else "fixed"
        cell(f"trained/{bits}/{kind}", lambda bits=bits, dynamic=dynamic, kind=kind: harden(
            float_model, f"{bits}-{kind}", bits=bits, dynamic=dynamic))
    for bits, per_channel in itertools.product(LEARN_BITS, (False, True)):
        rows = "channel" if per_channel else "tensor"
        for dynamic in (False, True):
            spec = QuantSpec(bits, dynamic, per_channel)

            def learned(spec: QuantSpec = spec, rows: str = rows) -> nn.Module:
                model = qg.convert(float_model, spec, data=few)
                if not spec.dynamic:
                    return model
                return harden(model, f"learned-{spec.bits}-{rows}", train="thresholds")
            cell(f"thresholds/{bits}/{rows}/{'learned' if dynamic else 'converted'}", learned)
    for bits in (32, 2):
        cell(f"longer/{bits}", lambda bits=bits: harden(
            float_model, f"longer-{bits}", MORE_EPOCHS, bits=bits, dynamic=bits < 32))
    return done


def spread(values: list[float]) -> str:
    """Return mean and 95 % t interval."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "missing"
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values)**0.5
    return f"{statistics.mean(values):6.2f} ± {half:.2f}"


def paired(a: list[float], b: list[float]) -> str:
    """Return a - b over the seeds, with its 95 % t interval and the paired t test's p."""
    p = float(scipy.stats.ttest_rel(a, b).pvalue) if len(a) > 1 and a != b else float("nan")
    return f"{spread([x - y for x, y in zip(a, b, strict=True)])} (p = {p:.2g})"


def tables() -> None:
    runs = [json.loads(f.read_text())["right"] for f in sorted(HERE.glob("seed*.json"))]
    if not runs:
        print("no seed is done yet")
        return

    def shares(name: str) -> list[float]:
        return [run[name] / 100 for run in runs]
    print(f"Fashion-MNIST, 10,000 test images, {len(runs)} seeds, per cent right, mean ± half of "
          "the 95 % t interval")
    print(f"float parent                 {spread(shares('float'))}")
    print("\nright after conversion       without data      from data         difference")
    for bits in START_BITS:
        free, data = shares(f"start/{bits}/statistics"), shares(f"start/{bits}/data")
        print(f"{bits} bits                       {spread(free):17} {spread(data):17} "
              f"{paired(free, data)}")
    base = shares("trained/float")
    print(f"\nclean fine-tune, {EPOCHS} epochs    accuracy          against float with the same")
    print(f"float                        {spread(base)}")
    for bits, kind in itertools.product(TRAIN_BITS, ("fixed", "dynamic")):
        values = shares(f"trained/{bits}/{kind}")
        print(f"{f'{bits} bits, {kind}':28} {spread(values):17} {paired(values, base)}")
    for bits in TRAIN_BITS:
        print(f"{bits} bits, dynamic over fixed: "
              f"{paired(shares(f'trained/{bits}/dynamic'), shares(f'trained/{bits}/fixed'))}")
    longer = shares("longer/32"), shares("longer/2")
    print(f"\n{MORE_EPOCHS} epochs: float {spread(longer[0])}, 2 bits, dynamic "
          f"{spread(longer[1])}, difference {paired(longer[1], longer[0])}")
    print("\nthresholds alone             converted         learned           difference")
    for bits, rows in itertools.product(LEARN_BITS, ("tensor", "channel")):
        before, after = (shares(f"thresholds/{bits}/{rows}/{kind}")
                         for kind in ("converted", "learned"))
        print(f"{f'{bits} bits, per {rows}':28} {spread(before):17} {spread(after):17} "
              f"{paired(after, before)}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    for seed in () if args.table_only else args.seeds:
        target = HERE / f"seed{seed}.json"
        if not target.exists():
            write_text(target, json.dumps({
                "seed": seed, "right": cells(seed), "of": 10_000, "parent_epochs": PARENT_EPOCHS,
                "epochs": EPOCHS, "more_epochs": MORE_EPOCHS,
                "recipe": qg.Recipe("clean").to_dict(),
                "python": platform.python_version(), "torch": version("torch"),
                "threads": torch.get_num_threads(), "cores": os.cpu_count(),
                "machine": platform.machine()}))
    tables()


if __name__ == "__main__":
    main()
