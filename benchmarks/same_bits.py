"""Hashes of what is computed on ten models of ten families, to compare two versions of the code.

Each model has seeded random weights, is converted at 1, 2, 4 and 8 bits, is evaluated by the quick
suite, and is certified on six images. Their labels are the converted model's answers. Hashed are
the converted model's logits, the image masks of every attack, the adversarials, the curve, and the
certificate's lower bounds.

    python benchmarks/same_bits.py FILE             # write it, cell by cell; resumes
    python benchmarks/same_bits.py FILE --against OTHER   # and compare; exit status 1: they differ

Float rounding differs between processors, so compare files of one machine only. PYTHONPATH chooses
the checkout of the package: run this once with each of two.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import quantguard as qg

IMAGES, SEED = 6, 3
BITS = (1, 2, 4, 8)


class Attention(nn.Module):
    """Patches, one of torch's attention layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, 8)
        self.layer = nn.TransformerEncoderLayer(24, 2, 48, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.layer(tokens).mean(1))


class Branches(nn.Module):
    """One activation module called twice, a function and a method, and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.act, self.head = nn.LeakyReLU(0.1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        x = self.act(x + torch.tanh(self.b(x)))
        return self.head(nn.functional.softplus(x).mean((2, 3)).relu())


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.ReLU(), nn.Linear(32, 32),
                         nn.ReLU(), nn.Linear(32, 10))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))


def of(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=10, **options)


def resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)


def densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=10)


# Name: model, side of its images.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "perceptron": (perceptron, 16), "convolutions": (convolutions, 16),
    "branches": (Branches, 16), "attention": (Attention, 16), "resnet": (resnet, 32),
    "densenet": (densenet, 32), "mobilenet v3": (of("mobilenet_v3_small"), 32),
    "squeezenet": (of("squeezenet1_1"), 32), "shufflenet": (of("shufflenet_v2_x0_5"), 32),
    "regnet": (of("regnet_y_400mf"), 32)}


def bits_of(values: Any) -> str:
    """Return a short hash of an array's bits."""
    values = np.ascontiguousarray(values.detach().numpy() if isinstance(values, Tensor)
                                  else np.asarray(values))
    return hashlib.sha256(str((values.dtype, values.shape)).encode()
                          + values.tobytes()).hexdigest()[:16]


def cell(name: str, bits: int) -> dict[str, Any]:
    make, side = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = make().eval()
        x = torch.rand(IMAGES, 3, side, side)
    converted = qg.convert(model, bits, dynamic=bits != 8, example=x[:1], data=[x])
    with torch.no_grad():
        logits = converted(x)
    batch = [(x, logits.argmax(1))]
    threat = qg.Threat(eps=2 / 255)
    result = qg.evaluate(converted, batch, threat, suite="quick", progress=False)
    row = {"logits": bits_of(logits),
           "broken": [bits_of(a.broken) for a in result.attacks],
           "survived": bits_of(result.survived), "adversarials": bits_of(result.adversarials),
           "curve": [[p.eps, p.survivors] for p in result.curve]}
    try:
        certificate = qg.certify(converted, batch, qg.Threat(eps=1e-4), method="ibp",
                                 progress=False)
        row["lower"] = bits_of(certificate.lower)
    except qg.QuantguardError:
        row["lower"] = "refused"  # the text may change
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--against", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.file.read_text()) if args.file.exists() else {}
    for name in MODELS:
        for bits in BITS:
            if f"{name}, {bits}" not in rows:
                rows[f"{name}, {bits}"] = cell(name, bits)
                args.file.write_text(json.dumps(rows, indent=1))
                print(f"{name}, {bits} bits", flush=True)
    if args.against:
        before = json.loads(args.against.read_text())
        different = [f"{key}: {what}" for key in rows for what in rows[key]
                     if rows[key][what] != before[key][what]]
        print("\n".join(different) or f"{len(rows)} cells: the same bits")
        sys.exit(bool(different))


if __name__ == "__main__":
    main()
