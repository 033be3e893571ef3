"""Images from npz files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loader_contents import read_all

from quantguard.core.errors import DataError
from quantguard.data.loader import load_data


def npz(tmp_path: Path, **arrays: Any) -> str:
    content: dict[str, Any] = {"x_test": np.zeros((4, 3, 5, 5), np.uint8),
                               "y_test": np.arange(4), **arrays}
    np.savez(tmp_path / "d.npz", **{k: v for k, v in content.items() if v is not None})
    return f"npz:{tmp_path / 'd.npz'}"


def test_npz_uint8_and_floats(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 5), dtype=np.uint8)
    images, labels = read_all(load_data(npz(tmp_path, x_test=pixels), "test"))
    assert torch.equal(images, torch.from_numpy(pixels).float().div(255))
    assert labels.tolist() == [0, 1, 2, 3]
    images, labels = read_all(load_data(
        npz(tmp_path, x_train=pixels / 255, y_train=np.uint8([9, 8, 7, 6])), "train"))
    assert images.dtype == torch.float32
    assert sorted(labels.tolist()) == [6, 7, 8, 9]


@pytest.mark.parametrize(("arrays", "message"), [
    ({"x_test": None}, "has no x_test"),
    ({"x_test": None, "y_test": None, "x_train": np.zeros(3)}, "has no x_test and no y_test"),
    ({"x_test": np.zeros((4, 5, 5, 3), np.uint8)}, "x.transpose(0, 3, 1, 2)"),
    ({"x_test": np.zeros((4, 28, 28, 1), np.uint8)}, "channels last"),
    ({"x_test": np.zeros((4, 5, 5), np.uint8)}, "x[:, None]"),
    ({"x_test": np.zeros((4, 25), np.uint8)}, "(N, C, H, W)"),
    ({"x_test": np.zeros((0, 1, 5, 5), np.uint8), "y_test": np.zeros(0, int)}, "no images"),
    ({"x_test": np.zeros((4, 1, 5, 5), np.int64)}, "int64"),
    ({"x_test": np.full((4, 1, 5, 5), 254.5)}, "254.5..254.5"),
    ({"x_test": np.full((4, 1, 5, 5), -0.5)}, "-0.5..-0.5"),
    ({"x_test": np.full((4, 1, 5, 5), np.nan)}, "holds NaN in 4 images, image 0"),
    ({"y_test": np.zeros(4)}, "float64 (4,)"),
    ({"y_test": np.zeros((4, 1), int)}, "int64 (4, 1)"),
    ({"y_test": np.arange(4) - 1}, "labels are -1..2"),
    ({"y_test": np.arange(3)}, "4 images and 3 labels"),
    ({"x_test": np.array([[1], [2, 3]], dtype=object)}, "holds arrays of Python objects"),
])
def test_wrong_npz(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_data(npz(tmp_path, **arrays), "test")
    assert message in str(caught.value)
    assert "d.npz" in str(caught.value)


def test_files_that_are_not_npz(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.npz does not exist"):
        load_data(f"npz:{tmp_path}/absent.npz", "test")
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(DataError, match="single array"):
        load_data(f"npz:{tmp_path}/a.npy", "test")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match="text.npz is not an npz file"):
        load_data(f"npz:{tmp_path}/text.npz", "test")
