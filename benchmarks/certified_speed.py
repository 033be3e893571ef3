"""Cost of a certificate: training for it and computing it.

    python benchmarks/certified_speed.py [--repeats 5]

The networks of certify.py with fixed 2-bit quantizers on 6,000 random images of 28x28, one thread.
Figures are CPU seconds, medians of interleaved repeats. Training: one epoch of `recipe="ibp"` over
one of `recipe="clean"`, batches of 256, including the checks and the validation (of two images) of
`harden`. Certifying: `qg.certify` by intervals alone, over one forward pass of the same images.
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
from typing import Any

import torch
from certify import BATCH, network
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.core.file_io import write_text

HERE = Path(__file__).parent / "results"
IMAGES = 6000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = (torch.rand(IMAGES, 1, 28, 28) * 255).round() / 255, torch.randint(0, 10, (IMAGES,))
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True)
    rows: dict[str, dict[str, list[float]]] = {}
    for net in ("small", "wide"):
        model = qg.convert(network(net), 2).eval()
        ready = qg.convert(network(net), 2, input_bits=8, input_range=(0.1, 0.9)).eval()

        def trained(recipe: qg.Recipe, model: Any = ready) -> None:
            qg.harden(model, loader, qg.Threat(eps=0.1), recipe=recipe, epochs=1,
                      val=[(x[:2], y[:2])], progress=False)

        def forward(model: Any = model) -> None:
            with torch.no_grad():
                for first in range(0, IMAGES, 64):
                    model(x[first : first + 64])

        def certified(model: Any = model) -> None:
            qg.certify(model, [(x, y)], qg.Threat(eps=0.1), method="ibp", progress=False)
        ways: dict[str, Callable[[], None]] = {
            "clean epoch": lambda: trained(qg.Recipe("clean", lr=1e-3)),
            "ibp epoch": lambda: trained(qg.Recipe("ibp", init="keep")),
            "forward": forward, "certify": certified}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(args.repeats + 1):
            for name, run in ways.items():
                begin = time.process_time()
                run()
                if number:  # the first one compiles
                    seconds[name].append(time.process_time() - begin)
        rows[net] = seconds
        middle = {name: statistics.median(took) for name, took in seconds.items()}
        print(f"{net:6} an epoch of ibp takes {middle['ibp epoch'] / middle['clean epoch']:.2f} "
              f"clean ones ({middle['ibp epoch']:.1f} s, {middle['clean epoch']:.1f} s); "
              f"certifying an image takes {middle['certify'] / middle['forward']:.1f} forward "
              f"passes ({1000 * middle['certify'] / IMAGES:.2f} ms)", flush=True)
    write_text(HERE / "certified_speed.json", json.dumps({
        "seconds": rows, "images": IMAGES, "batch": BATCH, "threads": 1, "cores": os.cpu_count(),
        "machine": platform.machine(), "python": platform.python_version(),
        "torch": version("torch")}))


if __name__ == "__main__":
    main()
