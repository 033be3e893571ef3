"""Does the twin attack see through networks that are known to mask their gradients?

Takes a folder with `fixed2.safetensors` and `fixed1.safetensors`: LeNets (5x5 convolutions 1-32-64
with padding 2, max-pooling by 2, linear 3136-256-10) with staircases `a{j}.thresholds`, `a{j}.step`
in place of ReLU, trained on Fashion-MNIST through the ramp. First 500 test images, Linf eps 0.1.

    python benchmarks/controls.py FOLDER [--networks fixed2 fixed1] [--images 500] [--threads N]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import quantguard as qg
from quantguard.attacks import PGD, Entry
from quantguard.data import load_data
from quantguard.files import write_text

HERE = Path(__file__).parent / "results" / "controls"
STEPS = 40


def network(path: Path) -> nn.Module:
    state = load_file(path)

    def act(j: int) -> nn.Module:
        if f"a{j}.thresholds" not in state:
            return nn.ReLU()
        return qg.QuantActivation.from_thresholds(state[f"a{j}.thresholds"], state[f"a{j}.step"])
    model = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), act(1), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), act(2), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 256), act(3), nn.Linear(256, 10))
    for index, name in ((0, "c1"), (3, "c2"), (7, "f1"), (9, "f2")):
        model[index].load_state_dict({k: state[f"{name}.{k}"] for k in ("weight", "bias")})
    return model.eval()


def suite() -> list[Entry]:
    entries = [Entry(f"PGD-{STEPS} {loss}", PGD(loss, STEPS), "pgd", True)
               for loss in ("ce", "margin")]
    return entries + [
        Entry(f"twin-{STEPS} {loss} k {a:g}-{b:g}", PGD(loss, STEPS, twin=(a, b)), "twin")
        for a, b in ((2, 16), (4, 32), (8, 8)) for loss in ("ce", "margin")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--networks", nargs="*", default=["fixed2", "fixed1"])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    HERE.mkdir(parents=True, exist_ok=True)
    for name in args.networks:
        result = qg.evaluate(network(args.folder / f"{name}.safetensors"),
                             load_data("fashion-mnist", "test"), qg.Threat(eps=0.1),
                             images=args.images, suite=suite())
        write_text(HERE / f"{name}.json", json.dumps(result.to_dict()))
        print(f"{name}: clean {result.clean_accuracy:.1%}, PGD (ce, margin) "
              f"{result.surviving('pgd').mean():.1%}, with the twin {result.robust_accuracy:.1%} "
              f"of {result.images} images; upper bounds")


if __name__ == "__main__":
    main()
