"""Standard suite against AutoAttack: at least its survivors broken, in at most half its time?

    pip install pyautoattack         # the reference, for this benchmark alone
    python benchmarks/evaluator.py FOLDER [--networks fixed2 ...] [--images 200]

FOLDER has the controls, see benchmarks/controls.py. Networks are `fixed2`, `fixed1`, `float`,
`8 bits` (the float one, converted) and `clean` (a LeNet of the same shape trained without attacks).
Fashion-MNIST's first test images, Linf eps 0.1, one thread, one network after the other. Seconds
are CPU seconds of this process, on which other load has little effect. The third row is AutoAttack
through our surrogate: the network itself with the gradient of its softened model, k = 8. Each
network writes its JSON when it is done and is then not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from controls import network
from pyautoattack import AutoAttack
from torch import Tensor, nn

import quantguard as qg
from quantguard.cli.demo import train_clean
from quantguard.core.file_io import write_text
from quantguard.data.loader import load_data
from quantguard.nn.pool_reordering import pools_first
from quantguard.nn.quant_activation import quantizers

HERE = Path(__file__).parent / "results" / "evaluator"
EPS, SEED = 0.1, 0


def model_of(name: str, folder: Path) -> nn.Module:
    if name in ("fixed2", "fixed1", "float"):
        return network(folder / f"{name}.safetensors")
    model = network(folder / "float.safetensors")
    train = load_data("fashion-mnist", "train", batch_size=128)
    if name == "8 bits":
        return qg.convert(model, 8, data=train).eval()
    torch.manual_seed(SEED)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    train_clean(model, train, 2)
    return model.eval()


class Seen(nn.Module):
    """Model inside contexts that change its gradient."""

    def __init__(self, model: nn.Module, mode: str | None) -> None:
        super().__init__()
        self.model, self.mode = model, mode

    def forward(self, x: Tensor) -> Tensor:
        through: Any = nullcontext() if self.mode is None else qg.backward(self.model, self.mode)
        with through, nullcontext() if self.mode is None else pools_first(self.model):
            return self.model(x)  # type: ignore[no-any-return]


def autoattack(model: nn.Module, x: Tensor, y: Tensor, mode: str | None) -> list[int]:
    """Return which images survive AutoAttack standard."""
    attack = AutoAttack(Seen(model, mode), norm="Linf", eps=EPS, version="standard", seed=SEED)
    attack.verbose = False
    found = attack.run_standard_evaluation(x, y, batch_size=200)
    found = found[0] if isinstance(found, tuple) else found
    with torch.no_grad():
        assert float((found - x).abs().max()) <= EPS + 1e-6
        return np.flatnonzero((model(found).argmax(1) == y).numpy()).tolist()


def measured(run: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.process_time()
    result = run()
    return result, time.process_time() - begin


def row(name: str, folder: Path, images: int) -> dict[str, Any]:
    model = model_of(name, folder)
    loader = load_data("fashion-mnist", "test", batch_size=images)
    x, y = (v[:images] for v in next(iter(loader)))
    ours, seconds = measured(lambda: qg.evaluate(model, [(x, y)], qg.Threat(eps=EPS), seed=SEED,
                                                 progress=False))
    record: dict[str, Any] = {
        "network": name, "images": images, "eps": EPS, "seed": SEED,
        "ours": {"survived": np.flatnonzero(ours.survived).tolist(), "seconds": seconds,
                 "verdict": ours.verdict, "flags": [f.name for f in ours.flags if f.raised],
                 "attacks": {a.label: int(a.broken.sum()) for a in ours.attacks}}}
    print(f"{name:8s} standard suite              {ours.survived.sum():4d} of {images} survive, "
          f"{seconds:5.0f} s; {ours.verdict}", flush=True)
    modes = [None, "sigmoid(8)"] if quantizers(model) else [None]
    for mode in modes:
        survived, taken = measured(lambda mode=mode: autoattack(model, x, y, mode))
        key = "autoattack" if mode is None else "autoattack through the softened model"
        record[key] = {"survived": survived, "seconds": taken}
        print(f"{name:8s} {key:27s} {len(survived):4d} of {images} survive, {taken:5.0f} s: "
              f"{taken / seconds:.2f} times ours", flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--networks", nargs="*",
                        default=["fixed2", "float", "fixed1", "8 bits", "clean"])
    parser.add_argument("--images", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    HERE.mkdir(parents=True, exist_ok=True)
    for name in args.networks:
        target = HERE / f"{name.replace(' ', '-')}.json"
        if target.exists():
            continue
        write_text(target, json.dumps({
            **row(name, args.folder, args.images), "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "pyautoattack")}, "threads": 1,
            "cores": os.cpu_count(), "machine": platform.machine()}))


if __name__ == "__main__":
    main()
