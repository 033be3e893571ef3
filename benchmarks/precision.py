"""Accuracy of training in bfloat16, against float32.

    python benchmarks/precision.py [--seeds 0 1 2 3 4] [--table-only]

Fashion-MNIST, Linf eps 0.1, `recipe="pgd"`, 2 bits fixed, an epoch in float and one with
quantizers. A LeNet (no BatchNorm, 6,000 training images) and the ResNet of `hardening.py` (3,000),
each trained clean for an epoch first. Each seed trains in float32 and in bfloat16 from the same
start, images and order. Evaluated in float32 on the first 2,000 test images: clean accuracy, and
accuracy under 20 steps of PGD on the margin through the softened model, an upper bound and the same
for both. Differences are paired; +- is half the 95 % t interval. Each seed of a network writes its
own JSON; missing ones are computed. On a machine whose `auto` is float32 the question does not
arise, and this is slow.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from fashion_lenet import lenet
from hardening import resnet
from torch.utils.data import DataLoader, Subset

import quantguard as qg
from quantguard.attacks import PGD
from quantguard.cli.demo import train_clean
from quantguard.core.file_io import write_text
from quantguard.data.loader import load_data

HERE = Path(__file__).parent / "results" / "precision"
EPS, EPOCHS, HELD, TEST = 0.1, 2, 250, 2000
NETS = {"LeNet": (lenet, 6_000), "ResNet": (resnet, 3_000)}


def split(seed: int, count: int, held: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return training and held-out images, different ones for each seed."""
    whole: Any = load_data("fashion-mnist", "train", batch_size=128).dataset
    start = seed * (count + held)
    middle, end = start + count, start + count + held
    return (DataLoader(Subset(whole, range(start, middle)), batch_size=128, shuffle=True),
            DataLoader(Subset(whole, range(middle, end)), batch_size=128))


def gained(first: list[float], second: list[float]) -> str:
    """Return both means, and the mean paired difference with half of its 95 % t interval."""
    gain = [b - a for a, b in zip(first, second, strict=True)]
    half = float(scipy.stats.t.ppf(0.975, len(gain) - 1)) \
        * statistics.stdev(gain) / len(gain) ** 0.5
    return f"{statistics.mean(first):5.1f} and {statistics.mean(second):5.1f}: " \
        f"{statistics.mean(gain):+.2f} +- {half:.2f} ({len(gain)} seeds)"


def run(net: str, seed: int) -> dict[str, Any]:
    make, count = NETS[net]
    train, held = split(seed, count, HELD)
    torch.manual_seed(seed)
    model = make()
    train_clean(model, train, 1)
    test = load_data("fashion-mnist", "test", batch_size=250)
    rows: dict[str, Any] = {}
    for precision in ("float32", "bfloat16"):
        begin = time.process_time()
        recipe = qg.Recipe("pgd", precision=precision)
        hard = qg.harden(model, train, qg.Threat(eps=EPS), bits=2, dynamic=False, recipe=recipe,
                         epochs=EPOCHS, val=held, seed=seed, progress=False)
        took = time.process_time() - begin
        found = qg.evaluate(hard, test, qg.Threat(eps=EPS), images=TEST, seed=seed, progress=False,
                            suite=[PGD("margin", 20, sharpness=(2, 16), seed=seed)])
        rows[precision] = {"clean": found.clean_accuracy, "robust": found.robust_accuracy,
                           "cpu_seconds": took, "recipe": recipe.to_dict()}
        print(net, seed, precision, f"clean {found.clean_accuracy:.1%}, attacked "
              f"{found.robust_accuracy:.1%}, {took:.0f} s", flush=True)
    return {"net": net, "seed": seed, "rows": rows, "eps": EPS, "epochs": EPOCHS, "images": count,
            "held_out": HELD, "test": TEST, "threads": torch.get_num_threads(),
            "cores": os.cpu_count(), "machine": platform.machine(),
            "python": platform.python_version(), "torch": version("torch")}


def table() -> None:
    for net in NETS:
        rows = [json.loads(f.read_text())["rows"] for f in sorted(HERE.glob(f"{net}-*.json"))]
        if len(rows) < 2:
            print(f"{net:7} missing")
            continue
        for kind in ("clean", "robust"):
            a, b = ([100 * row[p][kind] for row in rows] for p in ("float32", "bfloat16"))
            print(f"{net:7} {kind:7} float32 and bfloat16: {gained(a, b)}")
        ratio = statistics.median(r["float32"]["cpu_seconds"] / r["bfloat16"]["cpu_seconds"]
                                  for r in rows)
        print(f"{net:7} {ratio:.2f} times as fast in bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    HERE.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds if not args.table_only else ():
        for net in NETS:
            target = HERE / f"{net}-{seed}.json"
            if not target.exists():
                write_text(target, json.dumps(run(net, seed)))
    table()


if __name__ == "__main__":
    main()
