"""Robustness at 1, 2, 3 and 4 bits, against float with the same fine-tune.

    python benchmarks/hardening.py                           # every missing cell, then the table
    python benchmarks/hardening.py --cells lenet-32 lenet-2-fixed --seeds 0
    python benchmarks/hardening.py --try lr=1e-3 stability=3 --cells lenet-2-fixed
    python benchmarks/hardening.py --table-only

Fashion-MNIST, Linf eps 0.1. A network is trained clean, then hardened by `recipe="pgd"` for EPOCHS
epochs: a LeNet (5x5 convolutions 32-64, linear 256), `wide` (twice as many of each) or `resnet`
(ResNet-18's blocks at quarter width, no pre-activation). Variants of a cell:

- `ramp`: the same network at equal cost, with the inner attack through the ramp, no stability term,
  and calibration's own range;
- `naive`: as `ramp`, and without a quantizer on the input;
- `plain`: the recipe without a quantizer on the input;
- `walk`: half of the epochs on the float network first, which is better for `resnet` on held-out
  images;
- `ibp`: certified training from fresh weights for CERTIFIED_EPOCHS; its figure is a bracket, proven
  from below.

The standard suite, which attacks the softened model, runs once per cell on the first 500 test
images (`resnet`: 1,000). --try trains a cell with other settings and judges it by the quick suite
on the 1,000 images that are held out of training (the first tries: on 500 of them). Every try is
listed, and none uses a test image.

Each cell writes its own JSON when it is done and resumes after an interruption. On a GPU pass
--device cuda.
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
from fashion_lenet import lenet
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import quantguard as qg
from quantguard.cli.demo import train_clean
from quantguard.core.file_io import write_text
from quantguard.data.loader import load_data
from quantguard.training.hardening import hardened
from quantguard.training.recipes import recipe_of

HERE = Path(__file__).parent / "results" / "hardening"
EPS, EPOCHS, CLEAN_EPOCHS, HELD = 0.1, 4, 2, 1000
CERTIFIED_EPOCHS = 8  # two gradients per image; other recipes take four
RAMP: dict[str, Any] = {"sharpness": (), "stability": 0.0, "range_factor": 1.0}
CELLS = ["lenet-32",
         *(f"lenet-{b}-{kind}" for b in (4, 3, 2, 1) for kind in ("fixed", "dynamic")),
         "lenet-2-fixed-ramp", "lenet-2-fixed-naive", "lenet-32-plain", "lenet-2-fixed-plain",
         "lenet-32-ibp", "lenet-4-fixed-ibp", "lenet-2-fixed-ibp", "lenet-1-fixed-ibp",
         "wide-32", "wide-2-fixed", "resnet-32", "resnet-2-fixed", "resnet-2-dynamic",
         "resnet-2-fixed-walk", "resnet-2-dynamic-walk"]
# Measured before BatchNorm statistics were re-estimated at the start: not reproducible any more.
BEFORE = ["resnet-32-given-statistics", "resnet-2-fixed-given-statistics",
          "resnet-2-dynamic-given-statistics"]


class Block(nn.Module):
    """Two convolutions and a shortcut, ReLU last."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.short = nn.Identity() if before == width and stride == 1 else nn.Sequential(
            nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(self.norm1(self.first(x)).relu()))
        return (y + self.short(x)).relu()  # type: ignore[no-any-return]


def resnet() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    before = 16
    for width, stride in ((16, 1), (32, 2), (64, 2), (128, 2)):
        layers += [Block(before, width, stride), Block(width, width, 1)]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def data(batch: int = 128) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return the training images, and the held-out ones that judge tries: the last of the split."""
    whole: Any = load_data("fashion-mnist", "train", batch_size=batch).dataset
    cut = len(whole) - HELD
    return (DataLoader(Subset(whole, range(cut)), batch_size=batch, shuffle=True),
            DataLoader(Subset(whole, range(cut, len(whole))), batch_size=batch))


def clean_model(net: str, seed: int) -> nn.Module:
    """Return a clean float network; it is saved, so that all rows start from the same weights."""
    torch.manual_seed(seed)
    model = resnet() if net == "resnet" else lenet({"lenet": 1, "wide": 2}[net])
    path = HERE / "work" / f"{net}-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    train_clean(model, data()[0], CLEAN_EPOCHS)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


def trained(cell: str, seed: int, recipe: qg.Recipe, epochs: int, device: str | None, name: str,
            eps: float = EPS, first: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    net, bits, *kind = cell.split("-")
    made = hardened(clean_model(net, seed), data()[0], qg.Threat(eps=eps),
                    bits=int(bits) if first is None else {"*": int(bits), "first": first},
                    dynamic=None if bits == "32" else "dynamic" in kind, recipe=recipe,
                    epochs=epochs, train="all", val=None, run_dir=HERE / "work" / name, seed=seed,
                    device=device, progress=True)
    return made.model, {"cell": cell, "seed": seed, "epochs": epochs, "eps": EPS,
                        "trained eps": eps, "recipe": recipe.to_dict(), **made.to_dict()}


def own(cell: str, settings: dict[str, str], using: str = "pgd") -> tuple[qg.Recipe, int]:
    """Return a cell's recipe and epochs, with the settings of a try."""
    kind = cell.split("-")[2:]
    if "ramp" in kind or "naive" in kind:
        if settings:
            raise SystemExit(f"{cell} has settings of its own: try another cell")
        return qg.Recipe("pgd", **RAMP, input_bits=0 if "naive" in kind else None), EPOCHS
    if "plain" in kind:
        return recipe_of(using, {**settings, "input_bits": "0"}), EPOCHS
    if "ibp" in kind:
        return recipe_of("ibp", {"batch_size": "256", **settings}), CERTIFIED_EPOCHS
    return recipe_of(
        using, {"bit_schedule": "32", **settings} if "walk" in kind else settings
    ), EPOCHS


def machine() -> dict[str, Any]:
    return {"python": platform.python_version(), "torch": version("torch"),
            "machine": platform.machine(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads()}


def measure(cell: str, seed: int, device: str | None) -> None:
    target = HERE / f"{cell}-seed{seed}.json"
    if target.exists():
        return
    recipe, epochs = own(cell, {})
    model, record = trained(cell, seed, recipe, epochs, device, f"{cell}-{seed}")
    images = 1000 if cell.startswith("resnet") else 500
    result = qg.evaluate(model, load_data("fashion-mnist", "test"), qg.Threat(eps=EPS),
                         images=images, seed=seed, device=device, certify="ibp" in cell,
                         run_dir=HERE / "work" / f"{cell}-{seed}" / "evaluation")
    write_text(target, json.dumps({**record, "evaluation": result.to_dict(), **machine()}))


def attempt(cell: str, seed: int, settings: dict[str, str], device: str | None,
            epochs: int | None, eps: float | None, using: str, first: int | None) -> None:
    shown = ",".join(f"{k}={v}" for k, v in [
        *([("recipe", using)] if using != "pgd" else []),
        *([("first", first)] if first else []),
        *([("epochs", epochs)] if epochs else []), *([("eps", eps)] if eps else []),
        *sorted(settings.items())])
    name = f"{cell}-seed{seed}-{shown.replace(',', '_').replace('=', '') or 'default'}"
    target = HERE / "tries" / f"{name}.json"
    if not target.exists():
        recipe, usual = own(cell, settings, using)
        model, record = trained(cell, seed, recipe, epochs or usual, device, f"try-{name}",
                                eps or EPS, first)
        result = qg.evaluate(model, data()[1], qg.Threat(eps=EPS), suite="quick", seed=seed,
                             device=device)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, json.dumps({**record, "settings": shown, **machine(),
                                       "evaluation": result.to_dict()}))


def table() -> None:
    print(f"Fashion-MNIST, Linf eps {EPS}, first test images, standard suite; per cent: mean (each "
          "seed); attacked figures are upper bounds")
    for cell in (*CELLS, *BEFORE):
        rows = [json.loads(f.read_text()) for f in sorted(HERE.glob(f"{cell}-seed*.json"))]
        found = [qg.Evaluation.from_dict(row["evaluation"]) for row in rows]
        if not found:
            print(f"{cell:34} missing")
            continue
        clean, robust = ([100 * getattr(e, f"{kind}_accuracy") for e in found]
                         for kind in ("clean", "robust"))
        low, high = (100 * v for v in found[0].interval)
        proven = [f"{e.certificate.certified_accuracy:.1%}" for e in found if e.certificate]
        print(f"{cell:34} clean {statistics.mean(clean):5.1f}  robust "
              f"{statistics.mean(robust):5.1f}  ({', '.join(f'{v:.1f}' for v in robust)}; 95 % of "
              f"the first {low:.1f}-{high:.1f}; {', '.join(e.verdict for e in found)})"
              + f"  proven {', '.join(proven)}" * bool(proven))
    for file in sorted((HERE / "tries").glob("*.json")):
        row = json.loads(file.read_text())
        e = qg.Evaluation.from_dict(row["evaluation"])
        print(f"tried {row['cell']}, seed {row['seed']}: {row['settings'] or 'defaults'}: "
              f"{e.images} held-out, clean {e.clean_accuracy:.1%}, quick suite "
              f"{e.robust_accuracy:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", nargs="*", default=CELLS, choices=CELLS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--try", dest="settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--recipe", default="pgd", help="with --try")
    parser.add_argument("--first-bits", type=int, help="with --try: of the first activation")
    parser.add_argument("--epochs", type=int, help="with --try; default: as the cells")
    parser.add_argument("--train-eps", type=float, help="with --try; default: as attacked")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device")
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for seed in args.seeds if not args.table_only else ():
        for cell in args.cells:
            if args.settings is not None:
                attempt(cell, seed, dict(s.split("=", 1) for s in args.settings), args.device,
                        args.epochs, args.train_eps, args.recipe, args.first_bits)
            elif cell.startswith("lenet") or seed == 0:
                measure(cell, seed, args.device)
    table()


if __name__ == "__main__":
    main()
