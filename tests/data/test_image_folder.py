"""Images from class folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loader_contents import read_all
from PIL import Image

from quantguard.core.errors import DataError
from quantguard.data import image_folder
from quantguard.data.loader import load_data


def write_folder(root: Path, mode: str = "RGB", size: tuple[int, int] = (10, 8),
                 parts: tuple[str, ...] = ("train", "val"), classes: str = "ab") -> Path:
    rng = np.random.default_rng(0)
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(3):
                shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
                pixels = rng.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(root / part / name / f"{i}.png")
    return root


def test_imagefolder_reads_pixels_exactly(tmp_path: Path) -> None:
    write_folder(tmp_path)
    images, labels = read_all(load_data(f"imagefolder:{tmp_path}", "test"))
    assert images.shape == (6, 3, 8, 10)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and labels.dtype == torch.int64
    pixels = np.asarray(Image.open(tmp_path / "val/b/1.png"))
    assert torch.equal(images[4], torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255)


def test_imagefolder_reads_greyscale_as_one_channel(tmp_path: Path) -> None:
    write_folder(tmp_path, mode="L")
    loader = load_data(f"imagefolder:{tmp_path}", "train", mean=[0.5], std=[0.5])
    assert read_all(loader)[0].shape == (6, 1, 8, 10)
    with pytest.raises(DataError, match="3 numbers and the images have 1"):
        load_data(f"imagefolder:{tmp_path}", "train", mean=[0.5] * 3)


def test_imagefolder_refuses_to_convert_channels(tmp_path: Path) -> None:
    write_folder(tmp_path)
    odd = tmp_path / "val/a/1.png"
    Image.open(odd).convert("L").save(odd)
    with pytest.raises(DataError) as caught:
        load_data(f"imagefolder:{tmp_path}", "test")
    assert str(odd) in str(caught.value)
    assert "5 in mode RGB, 1 in mode L" in str(caught.value)
    write_folder(tmp_path / "p", mode="P")
    with pytest.raises(DataError, match="6 in mode P"):
        load_data(f"imagefolder:{tmp_path / 'p'}", "test")


def test_imagefolder_sizes(tmp_path: Path) -> None:
    write_folder(tmp_path)
    odd = tmp_path / "val/a/1.png"
    Image.open(odd).resize((7, 9)).save(odd)
    with pytest.raises(DataError) as caught:
        load_data(f"imagefolder:{tmp_path}", "test")
    assert all(part in str(caught.value) for part in ("10x8", "7x9", str(odd), "--size"))
    assert read_all(load_data(f"imagefolder:{tmp_path}", "test", size=6))[0].shape == (6, 3, 6, 6)


@pytest.mark.parametrize("size", [None, 32, 72])
def test_imagefolder_augments_train_reproducibly(tmp_path: Path, size: int | None) -> None:
    write_folder(tmp_path, size=(40, 40))
    loader = load_data(f"imagefolder:{tmp_path}", "train", size=size, augment=True)
    side = size or 40
    torch.manual_seed(3)
    first = [loader.dataset[0][0] for _ in range(3)]
    torch.manual_seed(3)
    assert all(torch.equal(loader.dataset[0][0], image) for image in first)
    assert not torch.equal(first[0], first[1])
    assert first[0].shape == (3, side, side)
    test = load_data(f"imagefolder:{tmp_path}", "test", size=size, augment=True).dataset
    assert torch.equal(test[0][0], test[0][0])


@pytest.mark.parametrize(("max_bytes", "times"), [(1 << 30, 1), (0, 2)], ids=["small", "large"])
def test_imagefolder_reads_a_small_image_once(tmp_path: Path, max_bytes: int, times: int,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    read: list[str] = []
    inner = image_folder._open_image

    def counted(path: str) -> Any:
        read.append(path)
        return inner(path)

    monkeypatch.setattr(image_folder, "_open_image", counted)
    monkeypatch.setattr(image_folder, "_MAX_CACHED_BYTES", max_bytes)
    loader = load_data(f"imagefolder:{tmp_path}", "test")
    images, _ = read_all(loader)
    loader.dataset[0][0].zero_()  # a caller that writes to an image has a copy
    assert torch.equal(read_all(loader)[0], images)
    assert len(read) == times * len(images) + (times - 1)


def test_imagefolder_structure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="val does not exist"):
        load_data(f"imagefolder:{tmp_path}", "test")
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="does not hold images"):
        load_data(f"imagefolder:{tmp_path}", "test")
    write_folder(tmp_path, parts=("val",))
    assert len(load_data(f"imagefolder:{tmp_path}", "test").dataset) == 6
    write_folder(tmp_path, parts=("train",), classes="bc")
    with pytest.raises(DataError) as caught:
        load_data(f"imagefolder:{tmp_path}", "test")
    assert "train: c" in str(caught.value) and "val: a" in str(caught.value)
    (tmp_path / "train/a").mkdir()
    (tmp_path / "val/c").mkdir()
    with pytest.raises(DataError, match="c"):
        load_data(f"imagefolder:{tmp_path}", "test")


def test_imagefolder_damaged_images(tmp_path: Path) -> None:
    write_folder(tmp_path, size=(64, 64))
    bad = tmp_path / "val/a/1.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(DataError, match="1.png is not a readable image"):
        read_all(load_data(f"imagefolder:{tmp_path}", "test"))
    bad.write_bytes(b"no image")
    with pytest.raises(DataError, match="1.png is not a readable image"):
        load_data(f"imagefolder:{tmp_path}", "test")
