"""Robustness of a short N-FGSM fine-tune on Fashion-MNIST, 2 bits against float.

A LeNet (conv 32-64, fc 256) is trained clean, then hardened for 3 epochs. The first 1,000 test
images, Linf eps 0.1. Three lines each: survivors of PGD-50 (cross-entropy and margin) through the
ramp, through every backward mode, and of all of these and attacks on the softened model.

    python benchmarks/fashion_lenet.py            # every missing cell, then the table
    python benchmarks/fashion_lenet.py --seeds 0 --rows float --table-only

Each cell writes its own JSON when it is done; the next run computes only missing cells.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import nn

import quantguard as qg
from quantguard.attacks import PGD, Entry
from quantguard.cli.demo import train_clean
from quantguard.core.file_io import write_text
from quantguard.data.loader import load_data

HERE = Path(__file__).parent / "results" / "fashion_lenet"
EPS, IMAGES, STEPS = 0.1, 1000, 50
BITS = {"float": 32, "2-bit dynamic": 2}
MODES = ("ste", "sigmoid(8)", "parent")
SHARPNESSES = ((2.0, 16.0), (4.0, 32.0), (8.0, 8.0))


def lenet(width: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32 * width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32 * width, 64 * width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136 * width, 256 * width), nn.ReLU(),
        nn.Linear(256 * width, 10))


def suite(seed: int, quantized: bool) -> list[Entry]:
    """Return the same attacks for every row.

    On a float model, attacks on the softened model are further restarts. Backward modes are left
    out there: they would be six more restarts, and the table shows what modes add.
    """
    entries = [Entry(f"PGD-{STEPS} {loss} ramp", PGD(loss, STEPS, seed=seed), "pgd", True)
               for loss in ("ce", "margin")]
    entries += [Entry(f"PGD-{STEPS} {loss} {mode}", PGD(loss, STEPS, mode=mode, seed=seed), "modes")
                for mode in MODES for loss in ("ce", "margin") if quantized]
    entries += [Entry(f"softened-{STEPS} {loss} k {a:g}-{b:g}",
                      PGD(loss, STEPS, sharpness=(a, b), seed=seed), "softened")
                for a, b in SHARPNESSES for loss in ("ce", "margin")]
    return entries


def clean_model(seed: int, epochs: int) -> nn.Module:
    """Return one float LeNet; it is saved, so that both rows start from the same weights."""
    model, path = lenet(), HERE / "work" / f"clean-{seed}.qg"
    if path.exists():
        return qg.load(path)
    torch.manual_seed(seed)
    model = lenet()
    train_clean(model, load_data("fashion-mnist", "train", batch_size=128), epochs)
    path.parent.mkdir(parents=True, exist_ok=True)
    qg.save(model, path)
    return model


def cell(seed: int, row: str, recipe: qg.Recipe, epochs: int, tag: str) -> None:
    target = HERE / f"{tag}{row.replace(' ', '-')}-seed{seed}.json"
    if target.exists():
        return
    threat = qg.Threat(eps=EPS)
    model = clean_model(seed, epochs=3)
    run_dir = HERE / "work" / f"{tag}{row}-{seed}"
    hardened = qg.harden(model, load_data("fashion-mnist", "train", batch_size=128), threat,
                         bits=BITS[row], dynamic=None if row == "float" else True, recipe=recipe,
                         epochs=epochs, seed=seed, run_dir=run_dir)
    qg.save(hardened, run_dir / "hardened.qg")
    result = qg.evaluate(hardened, load_data("fashion-mnist", "test"), threat, images=IMAGES,
                         suite=suite(seed, row != "float"), seed=seed, run_dir=run_dir)
    record = {"row": row, "seed": seed, "recipe": recipe.to_dict(), "epochs": epochs,
              "evaluation": result.to_dict()}
    write_text(target, json.dumps(record))


LINES = (("clean", ()), ("PGD-50 CE + margin, ramp", ("pgd",)),
         ("+ every backward mode", ("pgd", "modes")),
         ("+ the softened model", ("pgd", "modes", "softened")))


def table(tag: str) -> None:
    print(f"Fashion-MNIST, Linf eps {EPS}, first {IMAGES} test images; per cent, mean (each seed); "
          "attacked figures are upper bounds")
    for row in BITS:
        files = sorted(HERE.glob(f"{tag}{row.replace(' ', '-')}-seed*.json"))
        results = [qg.Evaluation.from_dict(json.loads(f.read_text())["evaluation"]) for f in files]
        for name, groups in LINES:
            values = [100 * e.surviving(*groups).mean() for e in results]
            said = f"{statistics.mean(values):5.1f}  ({', '.join(f'{v:.1f}' for v in values)})" \
                if values else "missing"
            print(f"{row:15} {name:28} {said}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="*", default=list(BITS))
    parser.add_argument("--sharpness", type=float, nargs="*",
                        help="twin sharpness of the inner step; the recipe's own by default")
    parser.add_argument("--tag", default="", help="prefix of the result files")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = qg.Recipe("nfgsm", sharpness=None if args.sharpness is None else
                       tuple(args.sharpness))
    if not args.table_only:
        for seed in args.seeds:
            for row in args.rows:
                cell(seed, row, recipe, 3, args.tag)
    table(args.tag)


if __name__ == "__main__":
    main()
