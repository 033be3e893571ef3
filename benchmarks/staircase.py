"""Speed of a quantized activation, against ReLU and against other libraries' quantizers.

    pip install brevitas          # optional: its rows are left out if it is not installed
    python benchmarks/staircase.py

Forward and backward on a (64, 64, 56, 56) float32 tensor. Every row is relative to an out-of-place
ReLU that is timed right before and right after it, median of the ratios. Then a training step of
ResNet-18 (batch 64, 32x32), converted over float: its time, the bytes that autograd saves, and peak
memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import quantguard as qg
from quantguard.core.file_io import write_text
from quantguard.core.specs import QuantSpec
from quantguard.nn.functional import compiled_kernels as fused

HERE = Path(__file__).parent / "results"
SHAPE = (64, 64, 56, 56)
ROUNDS = 25


def stairs(bits: int, dynamic: bool, per_channel: bool = False) -> qg.QuantActivation:
    module = qg.QuantActivation(QuantSpec(bits, dynamic, per_channel), nn.ReLU(), channels=SHAPE[1])
    m = 2**bits - 1
    t = 2.5 / m * (torch.arange(m) + 0.5)
    rows = (SHAPE[1],) if per_channel else ()
    module.set_thresholds(t.expand(*rows, m).clone(), torch.full(rows, 2.5 / m))
    return module


@contextmanager
def eagerly() -> Any:
    """Switch the compiled passes off, as without a compiler."""
    before = fused.WORTH, fused._CALL
    fused.WORTH = fused._CALL = sys.maxsize
    try:
        yield
    finally:
        fused.WORTH, fused._CALL = before


def timed(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> float:
    x.grad = None
    begin = time.perf_counter()
    function(x).backward(grad)
    return time.perf_counter() - begin


def peers() -> dict[str, Callable[[Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    fake = torch.ao.quantization.FakeQuantize(  # observer off, as late in training
        torch.ao.quantization.MovingAverageMinMaxObserver, 0, 3)
    fake(torch.rand(8))
    fake.disable_observer()
    found["torch FakeQuantize, 2 bits"] = fake
    try:
        import brevitas.nn
    except ImportError:
        return found
    found["Brevitas QuantReLU, 2 bits"] = brevitas.nn.QuantReLU(bit_width=2)
    return found


def activations() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    x, grad = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    rows: list[dict[str, Any]] = []

    def row(name: str, function: Callable[[Tensor], Tensor], model: nn.Module | None = None,
            ) -> None:
        begin = time.perf_counter()
        timed(function, x, grad)
        first = time.perf_counter() - begin
        pairs = []
        for _ in range(ROUNDS):
            before, own = timed(torch.relu, x, grad), timed(function, x, grad)
            pairs.append(((before + timed(torch.relu, x, grad)) / 2, own))
        kept: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            if not isinstance(value, nn.Parameter):
                kept[value.data_ptr()] = value.numel() * value.element_size()
            return value
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            function(x)
        rows.append({"name": name, "ratio": statistics.median(b / a for a, b in pairs),
                     "relu_ms": 1e3 * statistics.median(a for a, _ in pairs),
                     "ms": 1e3 * statistics.median(b for _, b in pairs),
                     "first_call_seconds": first, "kept_bytes": sum(kept.values()) / x.numel()})
        print(f"{name:42s} {rows[-1]['ratio']:6.2f} x ReLU  {rows[-1]['ms']:7.1f} ms  first call "
              f"{first:5.1f} s  keeps {rows[-1]['kept_bytes']:.2f} bytes an element", flush=True)

    row("ReLU again", torch.relu)
    for bits in (1, 2, 3, 4, 8):
        for dynamic in (False, True):
            row(f"{bits} bits, {'dynamic' if dynamic else 'fixed'}", stairs(bits, dynamic))
    for dynamic in (False, True):
        name = f"2 bits, {'dynamic' if dynamic else 'fixed'}"
        row(f"{name}, per channel", stairs(2, dynamic, True))
        with eagerly():
            row(f"{name}, no compiler", stairs(2, dynamic))
            row(f"{name}, per channel, no compiler", stairs(2, dynamic, True))
        module = stairs(2, dynamic)
        with qg.soften(module, 8):
            row(f"{name}, softened", module)
        with qg.backward(module, "sigmoid(8)"):
            row(f"{name}, sigmoid(8)", module)
    for name, function in peers().items():
        row(name, function)
    return rows


def resnet(bits: int, dynamic: bool) -> nn.Module:
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10)
    return net if bits == 32 else qg.convert(net, bits, dynamic, example=torch.randn(2, 3, 32, 32))


def step(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    begin = time.perf_counter()
    net.zero_grad()
    nn.functional.cross_entropy(net(images), labels).backward()
    return time.perf_counter() - begin


def training() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(64, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (64,), generator=generator)
    plain = resnet(32, False)
    step(plain, images, labels)
    rows = []
    for dynamic in (False, True):
        net = resnet(2, dynamic)
        step(net, images, labels)
        pairs = []
        for _ in range(ROUNDS):
            before, own = step(plain, images, labels), step(net, images, labels)
            pairs.append(((before + step(plain, images, labels)) / 2, own))
        kind = "dynamic" if dynamic else "fixed"
        peak = {name: float(subprocess.run(
            [sys.executable, __file__, "--peak", bits, kind], check=True, capture_output=True,
            text=True).stdout) for name, bits in (("float", "32"), ("converted", "2"))}
        rows.append({"name": f"ResNet-18 step, 2 bits, {kind}",
                     "ratio": statistics.median(b / a for a, b in pairs),
                     "float_ms": 1e3 * statistics.median(a for a, _ in pairs),
                     "ms": 1e3 * statistics.median(b for _, b in pairs), "peak_mib": peak})
        print(f"{rows[-1]['name']:42s} {rows[-1]['ratio']:6.2f} x float {rows[-1]['ms']:7.1f} ms  "
              f"peak {peak['converted']:.0f} MiB over {peak['float']:.0f}", flush=True)
    return rows


def peak(bits: int, dynamic: bool) -> float:
    """Return by how much two training steps raise this process's peak memory, in MiB."""
    net, images = resnet(bits, dynamic), torch.rand(64, 3, 32, 32)
    labels = torch.zeros(64, dtype=torch.long)
    step(net, images, labels)  # compiles
    net.zero_grad()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # free what that step left
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here (Linux)
    for _ in range(2):
        step(net, images, labels)
    return (status("VmHWM") - before) / 1024


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    warnings.filterwarnings("ignore")
    if sys.argv[1:2] == ["--peak"]:
        print(peak(int(sys.argv[2]), sys.argv[3] == "dynamic"))
        return
    with tempfile.TemporaryDirectory() as cold:  # cost of a first call on a new machine
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cold
        record = {"shape": SHAPE, "rounds": ROUNDS, "seed": 0, "activations": activations(),
                  "training": training(), "python": platform.python_version(),
                  **{name: installed(name) for name in ("torch", "torchvision", "brevitas")},
                  "threads": torch.get_num_threads(), "cores": os.cpu_count(),
                  "machine": platform.machine()}
    HERE.mkdir(exist_ok=True)
    write_text(HERE / "staircase.json", json.dumps(record))


if __name__ == "__main__":
    main()
