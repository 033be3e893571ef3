"""Files that were saved before the package was divided into rooms still load, as they were.

``fixtures/qg`` has one of each kind, made by the last commit before, and the logits that they gave
on these images.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import old_files_net  # noqa: F401  # a file opens by its class where that is imported
import pytest
import safetensors.torch
import torch
from torch import Tensor

import quantguard as qg

FILES = sorted((Path(__file__).parent / "fixtures" / "qg").glob("*.qg"))
LOGITS = FILES[0].parent / "logits.safetensors"


def images(name: str) -> Tensor:
    """Return what the logits were made from."""
    shape = (4, 3, 32, 32) if name in ("torchvision", "timm", "transformers") else (8, 1, 8, 8)
    return torch.rand(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_of_before_gives_the_logits_of_before(file: Path) -> None:
    expected = safetensors.torch.load_file(LOGITS)[file.stem]
    model = qg.load(file).eval()
    with torch.no_grad():
        found = model(images(file.stem))
    found = getattr(found, "logits", found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # of another processor


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_of_before_keeps_every_bit_of_its_tensors(file: Path, tmp_path: Path) -> None:
    qg.save(qg.load(file), tmp_path / "again.qg")
    tensors, manifests = [], []
    for path in (file, tmp_path / "again.qg"):
        with zipfile.ZipFile(path) as opened:
            tensors.append(safetensors.torch.load(opened.read("weights.safetensors")))
            manifests.append(json.loads(opened.read("manifest.json")))
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    assert manifests[0]["metadata"] == manifests[1]["metadata"]


def test_there_is_a_file_of_each_kind() -> None:
    assert {file.stem for file in FILES} == {
        "class", "dynamic-input", "fixed", "float", "hardened", "intercepted", "timm",
        "torchvision", "transformers"}
