"""How fast is PGD-40 through our bridge, beside what people use?

    pip install torchattacks adversarial-robustness-toolbox     # for this benchmark alone
    python benchmarks/pgd_speed.py ZIP [--images 32] [--repeats 3]

ZIP is CIFAR-10 as class folders of images (a `train/` or a `test/` in it does not matter). The
network is torchvision's ResNet-18 with a 3x3 stem and no max-pool, adversarially trained here by
our `nfgsm` recipe on the first images of ZIP (--train of them, eps 8/255); the attacked images are
the ones after those. Everybody takes 40 steps of 2.5 / 40 eps at Linf 8/255, float32, one thread,
the same images in one batch; only the last row leaves images out once they have fallen. Seconds
are CPU seconds of this process, median of the repeats, which take turns.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import time
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import foolbox as fb
import numpy as np
import torch
import torchattacks
import torchvision
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.attacks import PGD, FoolboxModel, gradient_attack
from quantguard.core.file_io import replacing, write_text
from quantguard.core.module_utils import frozen

HERE = Path(__file__).parent / "results"
EPS, STEPS, SEED = 8 / 255, 40, 0
STEP = 2.5 / STEPS


def pictures(path: Path, count: int) -> TensorDataset:
    """Read count images of a zip of class folders, in an order that a seed fixes."""
    with zipfile.ZipFile(path) as file:
        names = sorted(n for n in file.namelist() if n.lower().endswith((".jpg", ".jpeg", ".png")))
        classes = sorted({Path(n).parent.name for n in names})
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(SEED))
        chosen = [names[i] for i in order[:count].tolist()]
        x = np.stack([np.asarray(Image.open(io.BytesIO(file.read(n))).convert("RGB"))
                      for n in chosen])
    y = torch.tensor([classes.index(Path(n).parent.name) for n in chosen])
    return TensorDataset(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255, y)


def resnet18() -> nn.Module:
    torch.manual_seed(SEED)
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def trained(data: TensorDataset, epochs: int) -> nn.Module:
    """Train, or take the weights that an earlier run of the same settings left."""
    kept = HERE / "pgd_speed" / "work" / f"resnet18-{len(data)}-{epochs}.safetensors"
    model = resnet18()
    if kept.exists():
        model.load_state_dict(load_file(kept))
        return model.eval()
    recipe = qg.Recipe("nfgsm", lr=2e-3, ema=0.0)
    model = qg.harden(model, DataLoader(data, batch_size=64), qg.Threat(eps=EPS), bits=32,
                      recipe=recipe, epochs=epochs, seed=SEED)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with replacing(kept) as beside:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, beside)
    return model.eval()


def loop(model: nn.Module, x0: Tensor, y: Tensor) -> Tensor:
    """What one writes by hand."""
    x = (x0 + EPS * (2 * torch.rand_like(x0) - 1)).clamp(0, 1)
    for _ in range(STEPS):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), x)
        x = x.detach() + STEP * EPS * gradient.sign()
        x = (x0 + (x - x0).clamp(-EPS, EPS)).clamp(0, 1)
    return x


def contenders(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return by name what attacks the images; adversarials come back."""
    plain = fb.models.PyTorchModel(model, bounds=(0, 1), device="cpu")
    foolboxs = fb.attacks.LinfPGD(rel_stepsize=STEP, steps=STEPS)
    art = PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 1),
                            device_type="cpu")
    arts = ProjectedGradientDescentPyTorch(art, eps=EPS, eps_step=STEP * EPS, max_iter=STEPS,
                                           num_random_init=1, batch_size=len(x), verbose=False)
    theirs = torchattacks.PGD(model, eps=EPS, alpha=STEP * EPS, steps=STEPS)
    wanted = fb.criteria.Misclassification(y)

    def bridged(attack: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with frozen(model):
                return attack.run(FoolboxModel(model), x, wanted, epsilon=EPS)  # type: ignore
        return run

    def whole() -> Tensor:
        # broken images stay in the batch
        least, gradient_attack._LEAST = gradient_attack._LEAST, len(x)
        try:
            return bridged(PGD("ce", STEPS))()
        finally:
            gradient_attack._LEAST = least
    return {
        "plain Foolbox": lambda: foolboxs.run(plain, x, wanted, epsilon=EPS),
        "ART": lambda: torch.from_numpy(arts.generate(x.numpy(), y.numpy())),
        "torchattacks": lambda: theirs(x, y),
        "torch.autograd.grad loop": lambda: loop(model, x, y),
        "Foolbox's PGD through our bridge": bridged(foolboxs),
        "our PGD, no image left out": whole,
        "our PGD, the fallen left out": bridged(PGD("ce", STEPS))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("zip", type=Path)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = pictures(args.zip, args.train + args.images)
    x, y = data.tensors[0][args.train :], data.tensors[1][args.train :]
    model = trained(TensorDataset(*(t[: args.train] for t in data.tensors)), args.epochs)
    with torch.no_grad():
        clean = int((model(x).argmax(1) == y).sum())
    seconds: dict[str, list[float]] = {}
    standing: dict[str, int] = {}
    for _ in range(args.repeats):
        for name, attack in contenders(model, x, y).items():
            torch.manual_seed(SEED)
            begin = time.process_time()
            found = attack()
            seconds.setdefault(name, []).append(time.process_time() - begin)
            with torch.no_grad():
                standing[name] = int((model(found.float()).argmax(1) == y).sum())
            assert float((found - x).abs().max()) <= EPS + 1e-6
    base = statistics.median(seconds["plain Foolbox"])
    print(f"{clean} of {len(x)} images right without an attack")
    for name, took in seconds.items():
        middle = statistics.median(took)
        print(f"{name:34s} {middle:7.1f} s  {base / middle:5.2f} times plain Foolbox; "
              f"{standing[name]} stand")
    write_text(HERE / "pgd_speed.json", json.dumps({
        "seconds": seconds, "standing": standing, "clean": clean, "images": len(x),
        "steps": STEPS, "eps": EPS, "trained on": args.train, "epochs": args.epochs, "seed": SEED,
        "threads": 1, "cores": os.cpu_count(), "machine": platform.machine(),
        "python": platform.python_version(), **{p: version(p) for p in (
            "torch", "foolbox", "torchattacks", "adversarial-robustness-toolbox")}}))


if __name__ == "__main__":
    main()
