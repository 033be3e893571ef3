"""Effect of learned thresholds in adversarial training.

    python benchmarks/learned.py [--seeds 0 1 2 3 4] [--bits 2] [--table-only]

Fashion-MNIST, Linf eps 0.1, the LeNet of `fashion_lenet.py`, 11,500 training images, different ones
for each seed. The network is trained clean for an epoch, then by `recipe="pgd"` in float for
another. From there, with the same calibration, order and random starts, it is trained for two
epochs with fixed thresholds and for two with learned ones. On the first 2,000 test images: clean
accuracy, and survivors of 20 steps of PGD through the softened model on the margin and 20 on
cross-entropy, both upper bounds. Differences are paired; +- is half the 95 % t interval. Each seed
writes its own JSON; missing ones are computed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from fashion_lenet import lenet
from precision import gained, split

import quantguard as qg
from quantguard.attacks import PGD
from quantguard.cli.demo import train_clean
from quantguard.core.file_io import write_text
from quantguard.data.loader import load_data
from quantguard.nn.quant_activation import quantizers
from quantguard.training.optim import merging

HERE = Path(__file__).parent / "results" / "learned"
EPS, IMAGES, HELD, TEST = 0.1, 11_500, 500, 2000
THREAT = qg.Threat(eps=EPS)


def run(bits: int, seed: int) -> dict[str, Any]:
    train, held = split(seed, IMAGES, HELD)
    torch.manual_seed(seed)
    model = lenet()
    train_clean(model, train, 1)
    common: dict[str, Any] = {"val": held, "seed": seed, "progress": False}
    first = qg.harden(model, train, THREAT, bits=32, epochs=1, **common)
    test, rows = load_data("fashion-mnist", "test", batch_size=250), {}
    for kind in ("fixed", "learned"):
        recipe = qg.Recipe("pgd", bit_schedule=())
        hard = qg.harden(first, train, THREAT, bits=bits, dynamic=kind == "learned", recipe=recipe,
                         epochs=2, **common)
        found = qg.evaluate(hard, test, THREAT, images=TEST, seed=seed, progress=False, suite=[
            PGD(loss, 20, sharpness=(2, 16), seed=seed) for loss in ("margin", "ce")])
        rows[kind] = {"clean": found.clean_accuracy, "robust": found.robust_accuracy,
                      "recipe": recipe.to_dict(), "merged": merging(hard), "thresholds": {
                          name: m.thresholds.tolist() for name, m in quantizers(hard).items()}}
        print(f"{bits} bits, seed {seed}, {kind}: clean {found.clean_accuracy:.1%}, attacked "
              f"{found.robust_accuracy:.1%}", flush=True)
    return {"bits": bits, "seed": seed, "rows": rows, "eps": EPS, "images": IMAGES,
            "held_out": HELD, "test": TEST, "threads": torch.get_num_threads(),
            "cores": os.cpu_count(), "machine": platform.machine(),
            "python": platform.python_version(), "torch": version("torch")}


def table(bits: int) -> None:
    rows = [json.loads(f.read_text())["rows"] for f in sorted(HERE.glob(f"{bits}-bits-*.json"))]
    if len(rows) < 2:
        print("missing")
        return
    for kind in ("clean", "robust"):
        a, b = ([100 * row[p][kind] for row in rows] for p in ("fixed", "learned"))
        print(f"{bits} bits, {kind:7} fixed and learned: {gained(a, b)}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    HERE.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds if not args.table_only else ():
        target = HERE / f"{args.bits}-bits-{seed}.json"
        if not target.exists():
            write_text(target, json.dumps(run(args.bits, seed)))
    table(args.bits)


if __name__ == "__main__":
    main()
