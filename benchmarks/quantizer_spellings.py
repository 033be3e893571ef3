"""Evaluation of one quantized network, written with other people's quantizers in several ways.

A network of two convolutions and two linear layers with BatchNorm has its activations quantized to
1 to 4 bits, with even or uneven thresholds. It is trained on Fashion-MNIST by one-step adversarial
examples through a clipped straight-through Function. The same function is then written in several
ways, and each is evaluated: Linf, eps 0.1, the first test images. Our own form is the reference
row. All forms give the same answer on every image, which is checked.

    python benchmarks/quantizer_spellings.py                     # quick, 250 images, missing cells
    python benchmarks/quantizer_spellings.py --suite standard --images 1000 --bits 2 --kinds even
    python benchmarks/quantizer_spellings.py --table-only

Each cell writes its own JSON when it is done; the next run computes only missing cells. Trained
weights are in `results/quantizer_spellings/work`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantguard as qg
from quantguard.core.file_io import write_text
from quantguard.data.loader import load_data

HERE = Path(__file__).parent / "results" / "quantizer_spellings"
EPS, SEED, EPOCHS, RANGE = 0.1, 7, 5, 2.0
ALL_FORMS = {(2, "even")}  # of these networks; the others run the first four


def steps(bits: int, kind: str) -> tuple[Tensor, float]:
    """Return thresholds and the distance between two levels."""
    m = 2**bits - 1
    step = RANGE / (m + 1)
    t = (torch.arange(m) + 0.5) * step
    if kind == "uneven":
        t = RANGE * (t / RANGE) ** 1.5
    return t, step


class Clipped(torch.autograd.Function):
    """Lookup table of levels with a clipped straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, t: Tensor, step: float) -> Tensor:
        ctx.save_for_backward(z)
        return torch.bucketize(z, t) * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        return grads[0] * ((z > 0) & (z < RANGE)), None, None


class Misleading(Clipped):
    """The same with a gradient of the opposite sign."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return -grads[0], None, None


class Quantizer(nn.Module):
    """The same step function, written in one of several ways."""

    def __init__(self, form: str, t: Tensor, step: float) -> None:
        super().__init__()
        self.form, self.step = form, step
        self.register_buffer("t", t, persistent=False)
        self.own = qg.QuantActivation.from_thresholds(t, step) if form == "ours" else None

    def forward(self, z: Tensor) -> Tensor:
        t, step = self.t, self.step
        assert isinstance(t, Tensor)
        if self.own is not None:
            return self.own(z)  # type: ignore[no-any-return]
        if self.form in ("Function", "misleading Function"):
            cls = Clipped if self.form == "Function" else Misleading
            return cls.apply(z, t, step)  # type: ignore[no-any-return]
        if self.form == "fake_quantize":
            return torch.fake_quantize_per_tensor_affine(z, step, 0, 0, len(t))
        if self.form == "comparisons":
            return (z.unsqueeze(-1) > t).sum(-1).float() * step
        if self.form == "detach":
            y = z.clamp(0, RANGE)
            return y + (torch.bucketize(z, t) * step - y).detach()
        if self.form == "no_grad":
            with torch.no_grad():
                q = torch.bucketize(z, t) * step
            y = z.clamp(0, RANGE)
            return y + q - y.detach()
        if self.form == "one-hot":
            levels = torch.arange(len(t) + 1) * step
            return F.one_hot(torch.bucketize(z.detach(), t), len(levels)).float() @ levels + 0 * z
        if self.form == "numpy":
            counts = np.digitize(z.detach().numpy(), t.numpy(), right=True)
            return torch.from_numpy((counts * step).astype(np.float32)) + 0 * z
        if self.form == "heaviside":
            zero = torch.zeros(())
            above = [torch.heaviside((z - u).detach(), zero) for u in t]
            return torch.stack(above).sum(0) * step + 0 * z
        raise ValueError(self.form)


FORMS = ("ours", "Function", "comparisons", "misleading Function", "fake_quantize", "detach",
         "no_grad", "one-hot", "numpy", "heaviside")


class Net(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 16, 4, 2, 1), nn.Conv2d(16, 32, 4, 2, 1)
        self.f1, self.f = nn.Linear(32 * 49, 64), nn.Linear(64, 10)
        self.b1, self.b2, self.b3 = nn.BatchNorm2d(16), nn.BatchNorm2d(32), nn.BatchNorm1d(64)
        self.a1, self.a2, self.a3 = make(), make(), make()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a2(self.b2(self.c2(self.a1(self.b1(self.c1(x))))))
        return self.f(self.a3(self.b3(self.f1(y.flatten(1)))))  # type: ignore[no-any-return]


def trained(bits: int, kind: str) -> dict[str, Tensor]:
    """Return the weights of a net, trained once."""
    path = HERE / "work" / f"{bits}-{kind}.safetensors"
    if path.exists():
        return load_file(path)
    torch.manual_seed(SEED)
    t, step = steps(bits, kind)
    model = Net(lambda: Quantizer("Function", t, step))
    split = load_data("fashion-mnist", "train", batch_size=60000).dataset
    x, y = next(iter(torch.utils.data.DataLoader(split, batch_size=60000)))
    optimizer = torch.optim.Adam(model.parameters())
    batches = (len(x) + 127) // 128 * EPOCHS
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=batches)
    done = 0
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(128):
            images, labels, done = x[rows], y[rows], done + 1
            eps = EPS * min(1, done / (batches / 2))
            start = (images + (2 * torch.rand_like(images) - 1) * 2 * eps).clamp(0, 1)
            delta = (start - images).requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(images + delta), labels), delta)
            delta = (delta.detach() + eps * gradient.sign()).clamp(-2 * eps, 2 * eps)
            optimizer.zero_grad()
            F.cross_entropy(model((images + delta).clamp(0, 1)), labels).backward()
            optimizer.step()
            schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model.state_dict()


def cell(bits: int, kind: str, form: str, suite: str, images: int) -> dict[str, Any]:
    t, step = steps(bits, kind)
    state = trained(bits, kind)

    def made(form: str) -> nn.Module:
        model = Net(lambda: Quantizer(form, t, step)).eval()
        model.load_state_dict(state, strict=False)
        return model
    split = load_data("fashion-mnist", "test", batch_size=10000).dataset
    x, y = next(iter(torch.utils.data.DataLoader(split, batch_size=images)))
    model = made(form)
    with torch.no_grad():
        same = float((model(x).argmax(1) == made("ours")(x).argmax(1)).float().mean())
    begin = time.process_time()
    result = qg.evaluate(model, [(x, y)], qg.Threat(eps=EPS), suite=suite, progress=False)
    return {"bits": bits, "kind": kind, "form": form, "suite": suite, "images": images,
            "clean": result.clean_accuracy, "robust": result.robust_accuracy,
            "verdict": result.verdict, "fidelity": result.fidelity, "answers like ours": same,
            "flags": sorted(f.name for f in result.flags if f.raised and f.kind != "masked"),
            "cpu seconds": time.process_time() - begin, "eps": EPS, "seed": SEED,
            "python": platform.python_version(), "torch": version("torch"), "threads": 1,
            "machine": platform.machine()}


def table() -> None:
    rows = [json.loads(path.read_text()) for path in sorted(HERE.glob("*.json"))]
    ours = {(r["bits"], r["kind"], r["suite"], r["images"]): r["robust"]
            for r in rows if r["form"] == "ours"}
    for r in sorted(rows, key=lambda r: (r["suite"], r["images"], r["bits"], r["kind"],
                                         r["form"] != "ours", r["form"])):
        own = ours.get((r["bits"], r["kind"], r["suite"], r["images"]))
        apart = "" if own is None else f"{100 * (r['robust'] - own):+5.1f}"
        print(f"{r['suite']:8s} {r['images']:5d} images  {r['bits']} bits {r['kind']:6s} "
              f"{r['form']:20s} clean {r['clean']:6.1%}  robust {r['robust']:6.1%} {apart}  "
              f"{r['verdict']}  {r['cpu seconds']:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 1, 3, 4])
    parser.add_argument("--kinds", nargs="*", default=["even", "uneven"])
    parser.add_argument("--forms", nargs="*")
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    HERE.mkdir(parents=True, exist_ok=True)
    for bits in () if args.table_only else args.bits:
        for kind in args.kinds:
            forms = args.forms or (FORMS if (bits, kind) in ALL_FORMS else FORMS[:4])
            for form in forms:
                if form == "fake_quantize" and kind == "uneven":
                    continue
                path = HERE / f"{args.suite}-{args.images}-{bits}-{kind}-{form}.json"
                if not path.exists():
                    row = cell(bits, kind, form, args.suite, args.images)
                    write_text(path, json.dumps(row))
                    print(f"{path.stem}: {row['robust']:.1%}, {row['cpu seconds']:.0f} s",
                          flush=True)
    table()


if __name__ == "__main__":
    main()
