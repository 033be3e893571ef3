"""Standard suite on networks that are known to mask their gradients.

FOLDER has `fixed2.safetensors` and `fixed1.safetensors`: LeNets (5x5 convolutions 1-32-64 with
padding 2, max-pooling by 2, linear 3136-256-10) with quantizers `a{j}.thresholds`, `a{j}.step` in
place of ReLU, trained on Fashion-MNIST through the ramp. First 500 test images, Linf eps 0.1.

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
from quantguard.core.file_io import write_text
from quantguard.data.loader import load_data

HERE = Path(__file__).parent / "results" / "controls"


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--networks", nargs="*", default=["fixed2", "fixed1", "float"])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    HERE.mkdir(parents=True, exist_ok=True)
    for name in args.networks:
        result = qg.evaluate(network(args.folder / f"{name}.safetensors"),
                             load_data("fashion-mnist", "test"), qg.Threat(eps=0.1),
                             images=args.images, suite="standard", run_dir=HERE / "work" / name)
        write_text(HERE / f"{name}.json", json.dumps(result.to_dict()))
        default, through = ("noise", "fgsm", "pgd", "cw"), ("modes", "transfer", "softened")
        print(f"{name}, {result.images} images, upper bounds: clean {result.clean_accuracy:.1%}, "
              f"default attacks {result.surviving(*default).mean():.1%}, with every backward mode, "
              f"transfer and the twin {result.surviving(*default, *through).mean():.1%}, with "
              f"escalation {result.robust_accuracy:.1%}; {result.verdict}; {result.seconds:.0f} s")


if __name__ == "__main__":
    main()
