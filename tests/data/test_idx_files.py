"""MNIST and Fashion-MNIST from IDX files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loader_contents import read_all

from quantguard.core.errors import DataError
from quantguard.data import datasets as sources
from quantguard.data.loader import load_data


def idx(array: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def write_mnist(folder: Path, part: str = "t10k", count: int = 5,
                labels: int | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.arange(count * 28 * 28, dtype=np.uint8).reshape(count, 28, 28)
    (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
    classes = np.arange(count if labels is None else labels, dtype=np.uint8)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
        file.write(idx(classes))


@pytest.mark.parametrize("place", [".", "MNIST/raw"])
def test_mnist_reads_idx_plain_and_gz_in_either_place(tmp_path: Path, place: str) -> None:
    write_mnist(tmp_path / place)
    images, labels = read_all(load_data(f"mnist:{tmp_path}", "test"))
    assert labels.tolist() == [0, 1, 2, 3, 4]
    expected = np.arange(5 * 784, dtype=np.uint8).reshape(5, 1, 28, 28)
    assert torch.equal(images, torch.from_numpy(expected).float().div(255))


def test_mnist_is_not_taken_for_fashion_mnist(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST/raw")
    with pytest.raises(DataError, match="does not hold t10k-images-idx3-ubyte"):
        load_data(f"fashion-mnist:{tmp_path}", "test")


@pytest.mark.parametrize(("content", "message"), [
    (b"", "nothing"),
    (b"\x00\x00\x0d\x03" + bytes(12), "00 00 0d 03"),
    (idx(np.zeros((4, 3), np.uint8)), "IDX file of bytes in 3 dimensions"),
    (idx(np.zeros((4, 3, 3), np.uint8))[:-1], "35 bytes follow"),
    (idx(np.zeros((0, 3, 3), np.uint8)), "damaged or empty"),
])
def test_damaged_idx(tmp_path: Path, content: bytes, message: str) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_data(f"mnist:{tmp_path}", "test")
    assert message in str(caught.value)
    assert "t10k-images" in str(caught.value)


def test_truncated_gz_and_lengths_that_differ(tmp_path: Path) -> None:
    write_mnist(tmp_path, labels=4)
    with pytest.raises(DataError, match="5 images and .* 4 labels"):
        load_data(f"mnist:{tmp_path}", "test")
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(labels.read_bytes()[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        load_data(f"mnist:{tmp_path}", "test")


def test_the_cache_is_read_before_any_download(tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_mnist(tmp_path / ".cache/quantguard/MNIST/raw", "train", 7)
    assert len(read_all(load_data("mnist", "train"))[1]) == 7


def test_real_fashion_mnist() -> None:
    if not sources.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    loader = load_data("fashion-mnist", "test", batch_size=2000)
    images, labels = read_all(loader)
    assert images.shape == (10000, 1, 28, 28)
    assert labels.bincount().tolist() == [1000] * 10
    assert abs(float(images.mean()) - 0.2868) < 1e-3  # 0.286 is the published training mean
    assert len(load_data("fashion-mnist", "train").dataset) == 60000
