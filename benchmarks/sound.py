"""False alarms of the flags on sound float models.

Ten models with float activations on Fashion-MNIST, without randomness or any other trick: LeNet,
ResNet, MLP, ViT, and a ConvNet of GELU and average pooling. Each is trained clean and, from another
seed, by three steps of PGD, then with the recipe's 8-bit quantizer on the input. Each is evaluated
on six draws of images: draw d is the test images 128 d ... 128 d + 127 (two whole batches; 100
would take as long), suite quick, seed d. All of it takes about half an hour of CPU, and as much for
training. Linf eps is 0.1 for hardened models. At
0.1 PGD-20 leaves 5 to 7 % of a clean one, and without survivors nothing can be in doubt: for those
it is 0.05.

A false alarm is any raised flag of kind masked or unresolved, whatever the verdict. So few images
cannot raise every flag that more could: default attacks overstate from 8 of 128 images on, where
the threshold is 2 points. The table therefore has the mean over a model's draws, too. Whether the
same flags are raised where they should be is measured by benchmarks/masked.py.

Flags may be tuned on the five models of `tuning`. Those of `held out` share no weights with them
and run once afterwards.

    python benchmarks/sound.py                    # every missing cell, then the tables
    python benchmarks/sound.py --group tuning     # the models for tuning
    python benchmarks/sound.py --table-only

Each cell writes its own JSON when it is done; the next run computes only missing cells. Trained
weights are in `results/sound/work`. Seconds are CPU seconds of this process on one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fashion_lenet import lenet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantguard as qg
from quantguard.cli.demo import train_clean
from quantguard.core.file_io import write_text
from quantguard.core.statistics import clopper_pearson
from quantguard.data.loader import load_data

HERE = Path(__file__).parent / "results" / "sound"
DRAWS, IMAGES, SUITE = 6, 128, "quick"
EPS = {"clean": 0.05, "hardened": 0.1}
# Both groups have every architecture and both kinds of training.
GROUPS = {
    "tuning": ["LeNet clean", "ResNet hardened", "MLP clean", "ViT hardened", "ConvNet clean"],
    "held out": ["LeNet hardened", "ResNet clean", "MLP hardened", "ViT clean", "ConvNet hardened"]}
MODELS = [name for names in GROUPS.values() for name in names]


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut = nn.Identity() if stride == 1 else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Sixteen patches of 7x7 and a class token through three pre-norm encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 64, 7, 7)
        self.token = nn.Parameter(torch.zeros(1, 1, 64))
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, 64))
        self.layers = nn.Sequential(*(
            nn.TransformerEncoderLayer(64, 4, 128, dropout=0, activation="gelu", batch_first=True,
                                       norm_first=True) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.position
        return self.head(self.norm(self.layers(tokens)[:, 0]))  # type: ignore[no-any-return]


def resnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256),
                         nn.ReLU(), nn.Linear(256, 10))


def smooth() -> nn.Sequential:
    """Return a ConvNet without kinks: GELU and average pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.GELU(), nn.AvgPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.GELU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(3136, 64), nn.GELU(), nn.Linear(64, 10))


# name -> builder, epochs of clean training, epochs of PGD after half of those
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "LeNet": (lenet, 2, 1), "ResNet": (resnet, 2, 1), "MLP": (mlp, 8, 8), "ViT": (ViT, 6, 3),
    "ConvNet": (smooth, 2, 1)}


def trained(name: str) -> nn.Module:
    """Return a trained model, or read it from its file; each has a seed of its own."""
    architecture, training = name.split()
    build, epochs, hardening = ARCHITECTURES[architecture]
    seed, path = MODELS.index(name), HERE / "work" / f"{name.replace(' ', '-')}.safetensors"
    torch.manual_seed(seed)
    model = build()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    loader = load_data("fashion-mnist", "train", batch_size=128)
    if training == "clean":
        train_clean(model, loader, epochs, progress=False)
    else:
        train_clean(model, loader, epochs // 2, progress=False)
        model = qg.harden(model, loader, qg.Threat(eps=EPS[training]), bits=32, recipe="pgd",
                          epochs=hardening, seed=seed, progress=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model.eval()


def draws() -> list[tuple[Tensor, Tensor]]:
    return list(itertools.islice(load_data("fashion-mnist", "test", batch_size=IMAGES), DRAWS))


def cell(name: str, model: nn.Module, draw: int, images: tuple[Tensor, Tensor]) -> dict[str, Any]:
    eps = EPS[name.split()[1]]
    begin = time.process_time()
    result = qg.evaluate(model, [images], qg.Threat(eps=eps), suite=SUITE, seed=draw,
                         progress=False)
    seconds = time.process_time() - begin
    return {"model": name, "group": next(g for g, names in GROUPS.items() if name in names),
            "draw": draw, "first image": draw * IMAGES, "images": result.images, "eps": eps,
            "suite": SUITE, "seed": draw, "training seed": MODELS.index(name),
            "clean": result.clean_accuracy, "robust": result.robust_accuracy,
            "verdict": result.verdict, "flags": [vars(f) for f in result.flags],
            "fidelity": result.fidelity, "seconds": seconds,
            "attacks": {a.label: int(a.broken.sum()) for a in result.attacks},
            "environment": result.environment}


def alarms(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [f for f in record["flags"] if f["raised"] and f["kind"] != "undecided"]


def table(names: list[str]) -> None:
    records = [json.loads(path.read_text()) for name in names
               for path in sorted(HERE.glob(f"{name.replace(' ', '-')}-*.json"))]
    print(f"Fashion-MNIST, {IMAGES} images a draw, suite {SUITE}; per cent, attacked figures are "
          "upper bounds")
    for name in names:
        rows = [r for r in records if r["model"] == name]
        if not rows:
            print(f"{name:17s} missing")
            continue
        robust = [100 * r["robust"] for r in rows]
        verdicts = Counter(r["verdict"] for r in rows)
        print(f"{name:17s} {rows[0]['group']:8s} eps {rows[0]['eps']:4g}  {len(rows)} draws  clean "
              f"{100 * statistics.mean(r['clean'] for r in rows):5.1f}  robust "
              f"{statistics.mean(robust):5.1f} ({min(robust):.1f}-{max(robust):.1f})  fidelity "
              f"{statistics.mean(max(r['fidelity'].values()) for r in rows):.2f}  "
              f"{sum(bool(alarms(r)) for r in rows)} with alarms  "
              f"{', '.join(f'{n} {v}' for v, n in verdicts.items())}  "
              f"{statistics.mean(r['seconds'] for r in rows):.0f} s a draw")
    cells = sum(bool(alarms(r)) for r in records)
    if records:
        upper = clopper_pearson(cells, len(records))[1]
        print(f"\n{cells} of {len(records)} evaluations with a false alarm; one-sided 95 % bound "
              f"of the rate {upper:.1%}, were they independent")
    for record in records:
        for flag in alarms(record):
            print(f"  {record['model']}, draw {record['draw']}: {flag['name']} [{flag['kind']}] "
                  f"{flag['value']:.2f}, threshold {flag['threshold']:g}. {flag['reason']}")
    print("\nflag: false alarms, undecided; largest value of a draw; masked, whose points are of "
          "all images: largest mean of a model's draws, as of one evaluation of all; threshold")
    for flag in dict.fromkeys(f["name"] for r in records for f in r["flags"]):
        found = [(r["model"], f) for r in records for f in r["flags"] if f["name"] == flag]
        raised = Counter(f["kind"] for _, f in found if f["raised"])
        means = {name: statistics.mean(f["value"] for model, f in found if model == name)
                 for name in dict.fromkeys(model for model, _ in found)}
        most = max(means, key=lambda name: means[name])
        mean = f"; {means[most]:.2f} ({most})" * (found[0][1]["kind"] == "masked")
        print(f"  {flag:35s} {raised['masked'] + raised['unresolved']:2d}, "
              f"{raised['undecided']:2d} of {len(found)}; {max(f['value'] for _, f in found):5.2f}"
              f"{mean}; threshold {found[0][1]['threshold']:g}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--group", choices=list(GROUPS), help="both by default")
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = GROUPS[args.group] if args.group else MODELS
    HERE.mkdir(parents=True, exist_ok=True)
    for name in [] if args.table_only else names:
        targets = {d: HERE / f"{name.replace(' ', '-')}-{d}.json" for d in range(DRAWS)}
        missing = [d for d, target in targets.items() if not target.exists()]
        if not missing:
            continue
        model, images = trained(name), draws()
        for draw in missing:
            record = cell(name, model, draw, images[draw])
            write_text(targets[draw], json.dumps(record, indent=1))
            print(f"{name} {draw}: clean {record['clean']:.1%}, robust {record['robust']:.1%}, "
                  f"{record['verdict']}, {record['seconds']:.0f} s; "
                  f"{', '.join(f['name'] for f in alarms(record)) or 'no alarm'}", flush=True)
    table(names)


if __name__ == "__main__":
    main()
