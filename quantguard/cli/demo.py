"""The demo: a small CNN on handwritten digits, an ablation, and a certificate."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from ..conversion.checkpoint import save
from ..core.progress import Progress
from ..core.specs import Threat
from ..data.loader import load_data
from ..evaluation.comparison import Comparison
from ..evaluation.evaluator import evaluate
from ..training.ablation import ablate
from ..training.hardening import harden
from ..training.recipes import Recipe

EPS = 0.1
EPOCHS = 12
CERTIFIED_EPOCHS = 20
IMAGES: int | None = None  # all of the test images


def small_cnn() -> nn.Module:
    """Return the demo's network: three convolutions and two linear layers for 8x8 digits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10))


def certified_cnn() -> nn.Module:
    """Return a network for certified training: few layers, each with a BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10))


def train_clean(model: nn.Module, loader: DataLoader[tuple[torch.Tensor, torch.Tensor]],
                epochs: int, progress: bool = True) -> None:
    """Train an ordinary classifier with Adam and cross-entropy."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    bar = Progress("train a small CNN", epochs * len(loader), progress)
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            bar.advance()
    model.eval()
    bar.close()


def run(folder: str | os.PathLike[str], seed: int = 0, progress: bool = True) -> Comparison:
    """Run the demo; write the hardened models, ``report.json`` and ``report.html`` to folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    train, test = load_data("digits", "train", batch_size=64), load_data("digits", "test")
    model = small_cnn()
    train_clean(model, train, epochs=10, progress=progress)
    result = ablate(model, train, test, Threat(eps=EPS), bits=2, dynamic=True,
                    recipe=Recipe("pgd"), epochs=EPOCHS, suite="quick", seed=seed,
                    images=IMAGES, run_dir=target / "run", progress=progress)
    # one more row: a model that is trained for its certificate
    proven = harden(certified_cnn(), train, Threat(eps=EPS), bits=2, recipe="ibp",
                    epochs=CERTIFIED_EPOCHS, seed=seed, run_dir=target / "run" / "ibp",
                    progress=progress)
    row = evaluate(proven, test, Threat(eps=EPS), suite="quick", images=IMAGES, seed=seed,
                   certify=True, run_dir=target / "run" / "ibp-evaluation", progress=progress)
    save(list(result.models.values())[-1], target / "model.hardened.qg")
    save(proven, target / "model.certified.qg")
    result = dataclasses.replace(result, rows={**result.rows, "2-bit fixed, recipe ibp": row},
                                 models={**result.models, "2-bit fixed, recipe ibp": proven})
    result.save(target / "report.json")
    result.save(target / "report.html")
    shutil.rmtree(target / "run")  # needed only to resume an interrupted demo
    return result
