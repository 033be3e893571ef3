"""With BatchNorm and 2 bits: half of the epochs on the float network first?

    python benchmarks/walk.py [--nets digits fashion] [--seeds 5]

`harden` converts at once by default; `bit_schedule=(32,)` trains in float for half of the epochs.
In hardening.py that is better for the ResNet and worse for the LeNet. Here: the demo's CNN on
scikit-learn's digits (three convolutions, 6 epochs, the first 1,000 training images, judged on the
other 297), and four convolutions on 10,000 training images of Fashion-MNIST (4 epochs, judged on
1,000 others). Both have BatchNorm and are trained clean for 4 epochs first. Fixed thresholds, 2
bits, Linf eps 0.1, suite quick; no test image is used. Mean and 95 % t interval of the paired
difference. Each seed of a network is saved and not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, Subset

import quantguard as qg
from quantguard.cli.demo import small_cnn, train_clean
from quantguard.core.file_io import write_text
from quantguard.data.loader import load_data

HERE = Path(__file__).parent / "results"
WALKS: dict[str, tuple[int, ...]] = {"at once": (), "float first": (32,)}


def four() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after, size, stride in ((1, 16, 5, 2), (16, 32, 3, 1), (32, 64, 3, 2),
                                        (64, 64, 3, 1)):
        layers += [nn.Conv2d(before, after, size, stride, size // 2, bias=False),
                   nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


# net -> data, builder, training images, images to judge by, batch, epochs
NETS: dict[str, Any] = {
    "digits": ("digits", small_cnn, range(1000), range(1000, 1297), 64, 6),
    "fashion": ("fashion-mnist", four, range(10_000), range(59_000, 60_000), 128, 4)}


def measured(net: str, seed: int) -> dict[str, dict[str, float]]:
    name, make, trained, judged, batch, epochs = NETS[net]
    whole: Any = load_data(name, "train").dataset
    loader = DataLoader(Subset(whole, trained), batch_size=batch, shuffle=True)
    torch.manual_seed(seed)
    model = make()
    train_clean(model, loader, 4, progress=False)
    threat, found = qg.Threat(eps=0.1), {}
    for said, bit_schedule in WALKS.items():
        hardened = qg.harden(
            model,
            loader,
            threat,
            bits=2,
            recipe=qg.Recipe("pgd", bit_schedule=bit_schedule),
            epochs=epochs,
            seed=seed,
            progress=False,
        )
        result = qg.evaluate(hardened, DataLoader(Subset(whole, judged), batch_size=250), threat,
                             suite="quick", seed=seed, progress=False)
        found[said] = {"clean": result.clean_accuracy, "robust": result.robust_accuracy,
                       "images": result.images}
        print(f"{net} seed {seed} {said:12} clean {result.clean_accuracy:.1%}, robust <= "
              f"{result.robust_accuracy:.1%}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = HERE / "walk.json"
    kept = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    for net in args.nets:
        rows = kept["rows"].setdefault(net, {})
        for seed in range(args.seeds):
            if str(seed) not in rows:
                rows[str(seed)] = measured(net, seed)
                write_text(file, json.dumps({
                    **kept, "bits": 2, "eps": 0.1, "cores": os.cpu_count(),
                    "machine": platform.machine(), "python": platform.python_version(),
                    **{p: version(p) for p in ("torch", "torch-quantguard")}}))
    for net, rows in kept["rows"].items():
        for kind in ("clean", "robust"):
            gain = [100 * (r["float first"][kind] - r["at once"][kind]) for r in rows.values()]
            half = stats.t.ppf(0.975, len(gain) - 1) * statistics.stdev(gain) / len(gain) ** 0.5 \
                if len(gain) > 1 else float("nan")
            print(f"{net}, {len(gain)} seeds: float first gives {statistics.mean(gain):+.1f} +- "
                  f"{half:.1f} points {kind}")


if __name__ == "__main__":
    main()
