"""Certified share of Fashion-MNIST, MNIST or CIFAR-10, by number of bits.

    python benchmarks/certify.py                                    # small net, 2 and 32 bits
    python benchmarks/certify.py --net wide --epochs 28 --bits 2
    python benchmarks/certify.py --epochs 6 --seeds 0 --set lr=1e-2 --name slower
    python benchmarks/certify.py --data mnist:FOLDER --eps 0.3 --epochs 8 --bits 2
    python benchmarks/certify.py --data mnist:FOLDER --eps 0.1 --train-eps 0.2 --net wide --bits 2
    python benchmarks/certify.py --net wide --epochs 28 --bits 2 --committee 3
    python benchmarks/certify.py --epochs 6 --bits 2 --dynamic      # learned thresholds
    python benchmarks/certify.py --data imagefolder:FOLDER --eps 8/255 --net deep --augment --bits 2
    python benchmarks/certify.py --table-only

Networks: `small` has 4x4 convolutions of stride 2 with 16 and 32 channels, and linear 128. `wide`
has 32 and 64, and linear 256. `deep` adds a 3x3 convolution before each of those. `cnn7` has 3x3
convolutions with 64, 64, 128 (stride 2), 128 and 128 channels, and linear 512. All but the last
layer have no bias, then BatchNorm and ReLU, which `recipe="ibp"` converts. Batches are of 256;
every other setting is the recipe's own, unless --set changes it. The epoch is chosen by the share
that intervals certify of a held-out twentieth of the training set.

Certified: `qg.certify`, method "ibp", on all 10,000 test images. Attacked (without --no-attack):
the `standard` suite of `qg.evaluate` on the first 500, an upper bound. --committee N: seed s is one
network that averages the logits of the cells of seeds N s to N s + N - 1 and adds up their minutes;
members without weights in work/ are trained again. Each cell writes its own JSON when it is done
and resumes after an interruption. Minutes are of this machine, whatever else it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

import quantguard as qg
from quantguard.core.file_io import write_text
from quantguard.data.loader import load_data
from quantguard.training.hardening import hardened
from quantguard.training.recipes import recipe_of

HERE = Path(__file__).parent / "results" / "certify"
BATCH = 256
# (channels, kernel, stride) of convolutions, and the width of the linear layer
NETS: dict[str, tuple[list[tuple[int, int, int]], int]] = {
    "small": ([(16, 4, 2), (32, 4, 2)], 128), "wide": ([(32, 4, 2), (64, 4, 2)], 256),
    "deep": ([(32, 3, 1), (32, 4, 2), (64, 3, 1), (64, 4, 2)], 256),
    "cnn7": ([(64, 3, 1), (64, 3, 1), (128, 3, 2), (128, 3, 1), (128, 3, 1)], 512)}


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


class Committee(nn.Module):
    """Average of the logits of networks that end in a linear layer.

    Their last layers form one layer over all features, so that bounds use the differences of its
    rows.
    """

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        names = [[n for n, m in member.named_children() if isinstance(m, nn.Linear)][-1]
                 for member in members]
        lasts: list[Any] = [m.get_submodule(n) for m, n in zip(members, names, strict=True)]
        self.last = nn.Linear(sum(last.in_features for last in lasts), lasts[0].out_features)
        with torch.no_grad():
            self.last.weight.copy_(torch.cat([last.weight for last in lasts], 1) / len(lasts))
            self.last.bias.copy_(torch.stack([last.bias for last in lasts]).mean(0))
        for member, name in zip(members, names, strict=True):
            setattr(member, name, nn.Identity())
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([member(x) for member in self.members], 1))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Cell:
    """Settings of one training, which name its files."""

    data: str
    eps: float
    train_eps: float | None
    net: str
    bits: int
    epochs: int
    dynamic: bool
    augment: bool
    committee: int
    settings: dict[str, str]
    said: str  # name of the settings

    def name(self, seed: int) -> str:
        kind = called(self.data)
        return "-".join(filter(None, (
            "" if (kind, self.eps) == ("fashion-mnist", 0.1) else f"{kind}-{self.eps:g}",
            f"from{self.train_eps:g}" if self.train_eps else "", self.net, str(self.bits),
            "dynamic" * self.dynamic, f"{self.epochs}epochs", "augmented" * self.augment, self.said,
            f"committee{self.committee}" if self.committee else "", f"seed{seed}")))


def called(data: str) -> str:
    """Return the name of a DATA spec in files and tables."""
    kind, _, where = data.partition(":")
    return Path(where).stem if kind in ("imagefolder", "npz") else kind


def measure(cell: Cell, seed: int, attack: bool, device: str | None) -> None:
    name = cell.name(seed)
    target = HERE / f"{name}.json"
    if target.exists():
        return
    threat = qg.Threat(eps=cell.eps)
    if cell.committee:
        model, record = together(cell, seed, device)
    else:
        model, record = trained(cell, seed, device)
    test = load_data(cell.data, "test", batch_size=500)
    certificate = qg.certify(model, test, threat, method="ibp", device=device)
    lines = certificate.to_dict()
    for each in ("lower", "correct_images"):  # 10,000 numbers each
        del lines[each]
    record |= {"data": called(cell.data), "augment": cell.augment, "eps": cell.eps,
               "net": cell.net, "bits": cell.bits, "dynamic": cell.dynamic, "seed": seed,
               "epochs": cell.epochs, "certificate": lines, "python": platform.python_version(),
               "torch": version("torch"), "machine": platform.machine(), "cores": os.cpu_count(),
               "threads": torch.get_num_threads()}
    if attack:
        result = qg.evaluate(model, test, threat, images=500, seed=seed, device=device,
                             run_dir=HERE / "work" / name / "evaluation")
        broken = certificate.certified[:500] & ~result.survived
        assert not broken.any(), f"{int(broken.sum())} certified images were broken"
        record["certified_of_first"] = int(certificate.certified[:500].sum())
        record["evaluation"] = result.to_dict()
    target.parent.mkdir(parents=True, exist_ok=True)
    if not cell.committee:
        qg.save(model, HERE / "work" / f"{name}.qg")
    write_text(target, json.dumps(record))


def trained(cell: Cell, seed: int, device: str | None) -> tuple[nn.Module, dict[str, Any]]:
    recipe, eps = recipe_of("ibp", cell.settings), cell.train_eps or cell.eps
    train = load_data(cell.data, "train", batch_size=BATCH, augment=cell.augment)
    channels, _, side = train.dataset[0][0].shape
    begin = time.monotonic()
    torch.manual_seed(seed)
    made = hardened(network(cell.net, channels, side), train, qg.Threat(eps=eps), bits=cell.bits,
                    dynamic=cell.dynamic or None, recipe=recipe, epochs=cell.epochs, train="all",
                    val=None, run_dir=HERE / "work" / cell.name(seed), seed=seed, device=device,
                    progress=True)
    return made.model, {"recipe": recipe.to_dict(), "trained_eps": eps,
                        "train_seconds": time.monotonic() - begin, **made.to_dict()}


def together(cell: Cell, seed: int, device: str | None) -> tuple[nn.Module, dict[str, Any]]:
    alone = replace(cell, committee=0)
    seeds = [seed * cell.committee + i for i in range(cell.committee)]
    members, rows = [], []
    for each in seeds:
        measure(alone, each, False, device)
        rows.append(json.loads((HERE / f"{alone.name(each)}.json").read_text()))
        kept = HERE / "work" / f"{alone.name(each)}.qg"
        # weights are not committed, so those of a committed row are trained again
        members.append(qg.load(kept) if kept.exists() else trained(alone, each, device)[0])
    return Committee(members).eval(), {
        "members": seeds, "recipe": rows[0]["recipe"],
        "trained_eps": cell.train_eps or cell.eps,
        "train_seconds": sum(row["train_seconds"] for row in rows)}


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
        lines = f"{row.get('data', 'fashion-mnist')} {row['eps']:g}"
        print(f"{lines:18} {file.stem:34} clean {100 * c['clean'] / c['images']:.2f}  certified "
              f"{100 * c['certified_accuracy']:.2f}{attacked}  ({row['train_seconds'] / 60:.1f} "
              f"minutes, {c['seconds']:.0f} s to certify; {row['threads']} threads)")
    paired(rows)


def paired(rows: list[dict[str, Any]]) -> None:
    """Print how much more each number of bits certifies than float, by seed."""
    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row.get("data", "fashion-mnist"), row["eps"], row["net"], row["epochs"], row["seed"]
    usual = recipe_of("ibp").to_dict()
    plain = [row for row in rows if not row.get("dynamic") and not row.get("members")
             and row.get("trained_eps", row["eps"]) == row["eps"]
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
    parser.add_argument("--train-eps", type=lambda text: float(Fraction(text)),
                        help="default: as certified")
    parser.add_argument("--net", default="small", choices=NETS)
    parser.add_argument("--committee", type=int, default=0, metavar="N")
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
            measure(Cell(args.data, args.eps, args.train_eps, args.net, bits, args.epochs,
                         args.dynamic, args.augment, args.committee,
                         dict(s.split("=", 1) for s in args.settings), args.name),
                    seed, not args.no_attack, args.device)
    table()


if __name__ == "__main__":
    main()
