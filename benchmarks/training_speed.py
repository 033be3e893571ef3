"""Images per second of adversarial training, against ART and a plain loop.

    pip install adversarial-robustness-toolbox          # for this benchmark alone
    python benchmarks/training_speed.py [--repeats 3]

PGD-7 adversarial training in float, as in Madry et al. 2018 (every image of a batch attacked, the
loss on attacked images alone), on random images and weights: a LeNet (28x28, batches of 256) and
torchvision's ResNet-18 (32x32, batches of 64). ART is its AdversarialTrainerMadryPGD. The plain
loop calls .backward() in its inner attack, as is often written, so that parameters get gradients
that nothing uses. Ours is `qg.harden` with its checks, weight averaging and validation (of two
images), over twelve batches: in float32 and in bfloat16, and at 2 bits through the softened model
with the stability term in float32. Machines on which float32 is faster write a JSON of their own.
All on one thread; CPU seconds of this process, medians of interleaved repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from art.defences.trainer import AdversarialTrainerMadryPGD
from art.estimators.classification import PyTorchClassifier
from fashion_lenet import lenet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.core.file_io import write_text

HERE = Path(__file__).parent / "results"
EPS, STEPS, STEP, LR = 8 / 255, 7, 2 / 255, 1e-3


def resnet18() -> nn.Module:
    model: nn.Module = torchvision.models.resnet18(num_classes=10)
    return model


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int, int]] = {
    "LeNet": (lenet, (1, 28, 28), 256, 12), "ResNet-18": (resnet18, (3, 32, 32), 64, 12)}


def plain(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for x0, labels in zip(x.split(batch), y.split(batch), strict=True):
        near = (x0 + EPS * (2 * torch.rand_like(x0) - 1)).clamp(0, 1)
        model.eval()
        for _ in range(STEPS):
            near = near.detach().requires_grad_()
            F.cross_entropy(model(near), labels).backward()
            assert near.grad is not None
            near = near.detach() + STEP * near.grad.sign()
            near = (x0 + (near - x0).clamp(-EPS, EPS)).clamp(0, 1)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(near.detach()), labels).backward()
        optimizer.step()


def art(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> None:
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0, 1),
        optimizer=torch.optim.AdamW(model.parameters(), lr=LR), device_type="cpu")
    trainer = AdversarialTrainerMadryPGD(classifier, nb_epochs=1, batch_size=batch, eps=EPS,
                                         eps_step=STEP, max_iter=STEPS, num_random_init=1)
    trainer.fit(x.numpy(), y.numpy())


def ours(precision: str, bits: int = 32) -> Callable[[nn.Module, Tensor, Tensor, int], None]:
    def train(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> None:
        recipe = qg.Recipe("pgd", lr=LR, steps=STEPS, rel_step=STEP / EPS, bit_schedule=(),
                           precision=precision)
        qg.harden(model, DataLoader(TensorDataset(x, y), batch_size=batch), qg.Threat(eps=EPS),
                  bits=bits, recipe=recipe, epochs=1, val=[(x[:2], y[:2])], progress=False)
    return train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    trainers = {"ART, Madry's trainer": art, "plain .backward() loop": plain,
                "ours, float32": ours("float32"), "ours, bfloat16": ours("bfloat16"),
                "ours, 2 bits, float32": ours("float32", 2)}
    rows = {}
    for net, (make, shape, batch, batches) in NETS.items():
        torch.manual_seed(0)
        x, y = torch.rand(batch * batches, *shape), torch.randint(0, 10, (batch * batches,))
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(args.repeats):
            for name, train in trainers.items():
                model = make().eval()
                begin = time.process_time()
                train(model, x, y, batch)
                seconds[name].append(time.process_time() - begin)
        speed = {name: len(x) / statistics.median(took) for name, took in seconds.items()}
        rows[net] = {"images_per_second": speed, "seconds": seconds, "batch": batch}
        for name, value in speed.items():
            others = [value / speed[n] for n in ("ART, Madry's trainer", "plain .backward() loop")]
            print(f"{net:10} {name:24} {value:7.1f} images/s  {others[0]:5.2f} x ART  "
                  f"{others[1]:5.2f} x plain", flush=True)
    low = torch.cpu._is_amx_tile_supported()  # machines on which bfloat16 is faster
    write_text(HERE / f"training_speed{'' if low else '_float32'}.json", json.dumps({
        "rows": rows, "steps": STEPS, "eps": EPS, "threads": 1, "cores": os.cpu_count(),
        "python": platform.python_version(), "machine": platform.machine(),
        **{p: version(p) for p in ("torch", "torchvision", "adversarial-robustness-toolbox")}}))


if __name__ == "__main__":
    main()
