"""How much of Fashion-MNIST (or MNIST) can be certified, at which bits?

    python benchmarks/certify.py                                    # small net, 2 and 32 bits
    python benchmarks/certify.py --net wide --epochs 28 --bits 2
    python benchmarks/certify.py --epochs 6 --seeds 0 --set lr=1e-2 --name slower
    python benchmarks/certify.py --data mnist:FOLDER --eps 0.3 --epochs 8 --bits 2
    python benchmarks/certify.py --epochs 6 --bits 2 --dynamic      # thresholds are learned
    python benchmarks/certify.py --data imagefolder:FOLDER --eps 8/255 --net deep --augment --bits 2
    python benchmarks/certify.py --table-only

Nets: `small`: 4x4 convolutions of stride 2 with 16 and 32 channels, linear 128; `wide`: 32 and 64,
linear 256; `deep`: a 3x3 convolution before each of those; layers without bias, then BatchNorm and
ReLU, which `recipe="ibp"` converts. Every setting is the recipe's own, the same for all bits; the
epoch is chosen by what intervals certify of a held-out twentieth of the training set. Certified:
`qg.certify`, method "ibp", on all 10,000 test images. Attacked: `qg.evaluate`'s standard suite on
the first 500: an upper bound. Each cell writes its own JSON when it is done, and is resumed where
it was interrupted. Minutes are of this machine, whatever else runs on it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import nn

import quantguard as qg
from quantguard.data import load_data
from quantguard.files import write_text
from quantguard.hardening import hardened
from quantguard.recipes import recipe_of

HERE = Path(__file__).parent / "results" / "certify"
BATCH = 256
# (channels, kernel, stride) of convolutions, and the width of the linear layer
NETS: dict[str, tuple[list[tuple[int, int, int]], int]] = {
    "small": ([(16, 4, 2), (32, 4, 2)], 128), "wide": ([(32, 4, 2), (64, 4, 2)], 256),
    "deep": ([(32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2)], 256)}


def network(net: str, channels: int = 1, side: int = 28) -> nn.Module:
    """Return a net for square images and ten classes."""
    convolutions, hidden = NETS[net]
    layers: list[nn.Module] = []
    for width, kernel, stride in convolutions:
        layers += [nn.Conv2d(channels, width, kernel, stride, 1, bias=False),
                   nn.BatchNorm2d(width), nn.ReLU()]
        channels, side = width, side // stride
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(channels * side**2, hidden, bias=False),
        nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 10))


def called(data: str) -> str:
    """Return what a DATA spec is called in files and tables."""
    kind, _, where = data.partition(":")
    return Path(where).stem if kind in ("imagefolder", "npz") else kind


def measure(name: str, data: str, eps: float, net: str, bits: int, seed: int, epochs: int,
            dynamic: bool, augment: bool, settings: dict[str, str], attack: bool,
            device: str | None) -> None:
    target = HERE / f"{name}.json"
    if target.exists():
        return
    threat, recipe = qg.Threat(eps=eps), recipe_of("ibp", settings)
    train = load_data(data, "train", batch_size=BATCH, augment=augment)
    channels, _, side = train.dataset[0][0].shape
    begin = time.monotonic()
    torch.manual_seed(seed)
    made = hardened(network(net, channels, side), train, threat, bits=bits,
                    dynamic=dynamic or None, recipe=recipe, epochs=epochs, train="all", val=None,
                    run_dir=HERE / "work" / name, seed=seed, device=device, progress=True)
    seconds = time.monotonic() - begin
    test = load_data(data, "test", batch_size=500)
    certificate = qg.certify(made.model, test, threat, method="ibp", device=device)
    told = certificate.to_dict()
    for each in ("lower", "correct_images"):  # 10,000 numbers each; who is certified stays
        del told[each]
    record: dict[str, Any] = {
        "data": called(data), "augment": augment, "eps": eps, "net": net, "bits": bits,
        "dynamic": dynamic, "seed": seed, "epochs": epochs,
        "recipe": recipe.to_dict(), "train_seconds": seconds, **made.to_dict(),
        "certificate": told, "python": platform.python_version(),
        "torch": version("torch"), "machine": platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads()}
    if attack:
        result = qg.evaluate(made.model, test, threat, images=500, seed=seed, device=device,
                             run_dir=HERE / "work" / name / "evaluation")
        broken = certificate.certified[:500] & ~result.survived
        assert not broken.any(), f"{int(broken.sum())} certified images were broken"
        record["certified_of_first"] = int(certificate.certified[:500].sum())
        record["evaluation"] = result.to_dict()
    target.parent.mkdir(parents=True, exist_ok=True)
    qg.save(made.model, HERE / "work" / f"{name}.qg")
    write_text(target, json.dumps(record))


def table() -> None:
    print("Linf, per cent; certified: intervals, all test images; attacked: an upper bound, first "
          "500")
    rows = []
    for file in sorted(HERE.glob("*.json")):
        row = json.loads(file.read_text())
        rows.append(row)
        c, e = row["certificate"], row.get("evaluation")
        attacked = "" if e is None else (
            f"  first 500: certified {100 * row['certified_of_first'] / 500:.1f} <= true <= "
            f"{100 * qg.Evaluation.from_dict(e).robust_accuracy:.1f}")
        told = f"{row.get('data', 'fashion-mnist')} {row['eps']:g}"
        print(f"{told:18} {file.stem:34} clean {100 * c['clean'] / c['images']:.2f}  certified "
              f"{100 * c['certified_accuracy']:.2f}{attacked}  ({row['train_seconds'] / 60:.1f} "
              f"minutes, {c['seconds']:.0f} s to certify; {row['threads']} threads)")
    paired(rows)


def paired(rows: list[dict[str, Any]]) -> None:
    """Print how much more each number of bits certifies than float, by seed."""
    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row.get("data", "fashion-mnist"), row["eps"], row["net"], row["epochs"], row["seed"]
    usual = recipe_of("ibp").to_dict()
    plain = [row for row in rows if not row.get("dynamic")
             and all(usual[k] == v for k, v in row["recipe"].items())]
    by_float = {key(row): row["certificate"]["certified"] for row in plain if row["bits"] == 32}
    for bits in sorted({row["bits"] for row in plain} - {32}):
        for kind in sorted({k[:-1] for k in by_float}):
            apart = [(row["certificate"]["certified"] - by_float[key(row)]) / 100
                     for row in plain if row["bits"] == bits and key(row)[:-1] == kind
                     and key(row) in by_float]
            if len(apart) > 1:
                p = stats.ttest_1samp(apart, 0.0).pvalue
                half = stats.t.ppf(0.975, len(apart) - 1) * stats.sem(apart)
                print(f"{bits} bits certify {statistics.mean(apart):+.2f} +- {half:.2f} points "
                      f"more than float (95 % t interval, paired t p = {p:.2g}; {len(apart)} "
                      f"seeds; {kind[2]} net, {kind[3]} epochs)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--eps", type=lambda text: float(Fraction(text)), default=0.1)
    parser.add_argument("--net", default="small", choices=NETS)
    parser.add_argument("--augment", action="store_true")
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 32])
    parser.add_argument("--dynamic", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--set", dest="settings", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--name", default="", help="what --set is called in files and table")
    parser.add_argument("--no-attack", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device")
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if args.settings and not args.name:
        parser.error("--set needs a --name")
    if args.threads:
        torch.set_num_threads(args.threads)
    for seed in args.seeds if not args.table_only else ():
        for bits in args.bits:
            kind = called(args.data)
            what = "" if (kind, args.eps) == ("fashion-mnist", 0.1) else f"{kind}-{args.eps:g}"
            kind = "dynamic" * args.dynamic
            name = "-".join(filter(None, (what, args.net, str(bits), kind,
                                          f"{args.epochs}epochs", args.name, f"seed{seed}")))
            measure(name, args.data, args.eps, args.net, bits, seed, args.epochs, args.dynamic,
                    args.augment, dict(s.split("=", 1) for s in args.settings),
                    not args.no_attack, args.device)
    table()


if __name__ == "__main__":
    main()
