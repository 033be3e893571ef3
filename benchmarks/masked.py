"""Known ways of hiding a gradient: is each flagged, and is its figure close to the truth?

    python benchmarks/masked.py FOLDER [--images 200] [--suite quick] [--rows PART ...] [--known]

FOLDER has the controls, see benchmarks/controls.py. Each row is a network with the forward of
another one, or nearly, and with a hidden gradient. The truth is the lowest known figure of the
network behind it: of the suite on the same forward with its gradient in the open, of another row
with the same answers, or of TENFOLD, ten times the steps and queries, on the suite's survivors. Of
rows with the same answers TENFOLD runs on the first (--known: its result in an earlier run).
`k-WTA` (k winners take all, Xiao, Zhong, Zheng 2020, arXiv:1905.10510) is trained without attacks.
Fashion-MNIST's first test images, Linf eps 0.1. A row is caught if a flag of kind masked or
unresolved is raised. It is seen through if the figure is at most 3 points above the truth.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from controls import network
from fashion_lenet import lenet
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import quantguard as qg
from quantguard.attacks import PGD, Square
from quantguard.cli.demo import train_clean
from quantguard.core.file_io import write_text
from quantguard.data.loader import load_data
from quantguard.nn.quant_activation import QuantActivation

HERE = Path(__file__).parent / "results"
EPS, SEED = 0.1, 0


# Rows with the same answer on every image: an adversarial of one is one of the others.
ALIKE = (("logits x10", "logits x30", "logits x100", "logits x300 on 30 % of the images",
          "softmax of logits x10"),
         ("rounding, torch.round", "rounding, a zero Function"), ("1 bit by torch.sign",),
         ("2 bits, trained through the ramp", "2 bits, surrogate lost"), ("k-WTA",))
STRIDE: dict[str, Any] = {"rel_step": 0.4, "decay": True}
# The quick suite has 20 steps and 200 queries.
TENFOLD = [
    PGD("ce", 200, sharpness=(2, 64), seed=1001, **STRIDE),
    PGD("margin", 200, sharpness=(4, 64), target=1, seed=1002, **STRIDE),
    PGD("margin", 200, sharpness=(4, 64), target=2, seed=1003, **STRIDE),
    PGD("ce", 200, sharpness=(8, 128), average=4, seed=1004, **STRIDE),
    PGD("scaled", 200, average=4, bpda=False, seed=1005, **STRIDE),
    Square(2000, seed=1006)]


class Scaled(nn.Module):
    """Logits times a number, on all images or on a share that a hash of the logits chooses."""

    def __init__(self, model: nn.Module, scale: float, share: float = 1.0) -> None:
        super().__init__()
        self.model, self.scale, self.share = model, scale, share

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.model(x)
        some = (z.detach().abs().sum(1) * 997) % 1 < self.share
        return torch.where(some.unsqueeze(1), self.scale * z, z)


class Softmax(nn.Module):
    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * self.model(x)).softmax(1)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x.relu()).round() / 4

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


class ZeroFunction(nn.Module):
    """Rounding by a Function with a zero backward."""

    def forward(self, x: Tensor) -> Tensor:
        return _NoGradient.apply(x)  # type: ignore[no-any-return]


class Round(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (4 * x.relu()).round() / 4


class OpenRound(nn.Module):
    """The same rounding with ReLU's gradient."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.relu()
        return y + ((4 * y).round() / 4 - y).detach()


class Sign(nn.Module):
    """1-bit quantizer written with torch.sign."""

    def __init__(self, staircase: QuantActivation) -> None:
        super().__init__()
        self.t, self.step = float(staircase.thresholds), float(staircase.step)

    def forward(self, x: Tensor) -> Tensor:
        return (1 + torch.sign(x - self.t)) * (self.step / 2)


class Lost(nn.Module):
    """Quantizer whose surrogate a tracer has lost: comparisons, without any gradient."""

    def __init__(self, staircase: QuantActivation) -> None:
        super().__init__()
        self.t, self.step = staircase.thresholds.detach(), float(staircase.step)

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-1) > self.t).sum(-1).float() * self.step + 0 * x


class KWTA(nn.Module):
    """Keep the largest tenth of an image's activations."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1)
        least = rows.topk(max(1, rows.shape[1] // 10), dim=1).values[:, -1:]
        return (rows * (rows >= least)).reshape(x.shape)


def swapped(model: nn.Module, kind: Any) -> nn.Module:
    """Return model with its activations replaced."""
    assert isinstance(model, nn.Sequential)
    acts = (nn.ReLU, QuantActivation)
    return nn.Sequential(*(kind(m) if isinstance(m, acts) else m for m in model)).eval()


def winners() -> nn.Module:
    """Train a k-WTA network without attacks."""
    torch.manual_seed(SEED)
    model = swapped(lenet(), lambda _: KWTA())
    train_clean(model, load_data("fashion-mnist", "train", batch_size=128), 1)
    return model.eval()


def rows(folder: Path, some: list[str] | None) -> dict[str, tuple[nn.Module, nn.Module | None]]:
    """Return by name: the network, and the one with its gradient in the open, if there is one."""
    def load(name: str) -> nn.Module:
        return network(folder / f"{name}.safetensors")
    float_model, one, two = load("float"), load("fixed1"), load("fixed2")
    open_round = swapped(load("float"), lambda _: OpenRound())
    found: dict[str, tuple[nn.Module, nn.Module | None]] = {
        "logits x10": (Scaled(load("float"), 10.0), float_model),
        "logits x30": (Scaled(load("float"), 30.0), float_model),
        "logits x100": (Scaled(load("float"), 100.0), float_model),
        "logits x300 on 30 % of the images": (Scaled(load("float"), 300.0, 0.3), float_model),
        "softmax of logits x10": (Softmax(load("float"), 10.0), float_model),
        "rounding, torch.round": (swapped(load("float"), lambda _: Round()), open_round),
        "rounding, a zero Function": (swapped(load("float"), lambda _: ZeroFunction()), open_round),
        "1 bit by torch.sign": (swapped(load("fixed1"), Sign), one),
        "2 bits, trained through the ramp": (load("fixed2"), two),
        "2 bits, surrogate lost": (swapped(load("fixed2"), Lost), two),
        # trained here, so only if requested
        **({} if some and not any(s in "k-WTA" for s in some) else {"k-WTA": (winners(), None)})}
    return {name: row for name, row in found.items() if not some or any(s in name for s in some)}


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["name"], row["images"], row["suite"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--rows", nargs="*", help="parts of names: only those are measured anew")
    parser.add_argument("--known", action="store_true", help="truths as an earlier run found them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    truths: dict[int, float] = {}
    target = HERE / "masked.json"
    kept = json.loads(target.read_text())["rows"] if args.rows and target.exists() else []
    table: dict[tuple[Any, ...], dict[str, Any]] = {key_of(row): row for row in kept}
    images = load_data("fashion-mnist", "test").dataset

    def evaluated(model: nn.Module, rows: Any = range(args.images),
                  suite: Any = args.suite) -> qg.Evaluation:
        loader = DataLoader(Subset(images, rows), batch_size=64)
        return qg.evaluate(model, loader, qg.Threat(eps=EPS), suite=suite, seed=SEED,
                           progress=False)
    for name, (model, behind) in rows(args.folder, args.rows).items():
        result = evaluated(model)
        before = [row for row in table.values() if args.known
                  and (row["name"], row["images"]) == (name, args.images)]
        truth = min([1.0, *(row["open"] for row in before)])
        if behind is not None and not before:
            if id(behind) not in truths:
                truths[id(behind)] = evaluated(behind).robust_accuracy
            truth = truths[id(behind)]
        tenfold = min([result.robust_accuracy, *(row["tenfold"] for row in before)])
        if not args.known and any(name == group[0] for group in ALIKE) and result.survived.any():
            rest = evaluated(model, result.survived.nonzero()[0].tolist(), TENFOLD)
            tenfold = int(rest.survived.sum()) / args.images
        flags = {f.name: f.kind for f in result.flags if f.raised and f.kind != "undecided"}
        default = result.surviving("fgsm", "pgd").mean()
        row = {"name": name, "images": args.images, "suite": args.suite,
               "clean": result.clean_accuracy, "default": float(default),
               "robust": result.robust_accuracy, "open": truth, "tenfold": tenfold, "flags": flags,
               "caught": bool(flags),
               "attacks": {a.label: int(a.broken.sum()) for a in result.attacks}}
        table[key_of(row)] = row
        print(f"{name}: {result.robust_accuracy:.1%}, in the open {truth:.1%}, "
              f"ten times the budget {tenfold:.1%}, {result.seconds:.0f} s", flush=True)
    for row in table.values():
        alike = next(group for group in ALIKE if row["name"] in group)
        row["truth"] = min(min(other[k] for k in ("robust", "open", "tenfold"))
                           for other in table.values()
                           if other["name"] in alike and other["images"] == row["images"])
        row["through"] = row["robust"] - row["truth"] < 0.03 + 1e-9
        print(f"{row['name']:34s} {row['images']} images, {row['suite']:8s} "
              f"clean {row['clean']:6.1%}  FGSM and PGD {row['default']:6.1%}  "
              f"suite {row['robust']:6.1%}  truth {row['truth']:6.1%}  "
              f"{'seen through' if row['through'] else 'NOT SEEN THROUGH'}; "
              f"{', '.join(row['flags']) or 'NOT CAUGHT'}")
    HERE.mkdir(exist_ok=True)
    write_text(target, json.dumps({
        "rows": list(table.values()), "eps": EPS, "seed": SEED,
        "python": platform.python_version(), "torch": version("torch"), "threads": 1,
        "machine": platform.machine()}))


if __name__ == "__main__":
    main()
