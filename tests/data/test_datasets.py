"""DATA specs: their settings, and the data sets with a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loader_contents import read_all

from quantguard.core.errors import DataError, SpecError
from quantguard.core.specs import Threat
from quantguard.data import datasets as sources
from quantguard.data.batches import (
    to_pixels,
)
from quantguard.data.loader import load_data


@pytest.mark.parametrize(("spec", "message"), [
    ("fashion_mnist", "Did you mean fashion-mnist?"),
    ("digit", "Did you mean digits?"),
    ("npz:", "Use digits |"),
    ("npz", "npz:FILE"),
    ("imagefolder", "imagefolder:DIR"),
    ("digits:somewhere", "takes no ROOT"),
])
def test_unknown_spec_names_the_nearest(spec: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_data(spec, "test")
    assert message in str(caught.value)


def test_a_bare_path_is_told_which_spec_it_needs(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=f"imagefolder:{tmp_path}"):
        load_data(str(tmp_path), "test")
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(SpecError, match="npz:.*x.npz"):
        load_data(str(tmp_path / "x.npz"), "test")


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"split": "val"}, SpecError, "split='val'"),
    ({"batch_size": 0}, SpecError, "batch_size=0"),
    ({"size": -1}, SpecError, "size=-1"),
    ({"size": True}, SpecError, "size=True"),
    ({"mean": (0.1, 0.2, 0.3)}, DataError, "mean has 3 numbers and the images have 1 channels"),
    ({"std": (0.0,)}, DataError, "positive"),
    ({"mean": (float("nan"),)}, DataError, "finite"),
])
def test_wrong_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        load_data("digits", **{"split": "test", **options})
    assert message in str(caught.value)


def test_digits_are_sklearns_split_once_and_for_all() -> None:
    from sklearn.datasets import load_digits

    train, train_labels = read_all(load_data("digits", "train"))
    test, test_labels = read_all(load_data("digits", "test"))
    assert train.shape == (1297, 1, 8, 8)
    assert test.shape == (500, 1, 8, 8)
    assert train.dtype == torch.float32 and train_labels.dtype == torch.int64
    source = load_digits()
    ours = sorted(map(bytes, torch.cat([train, test]).mul(16).byte().flatten(1).numpy()))
    assert ours == sorted(map(bytes, source.data.astype(np.uint8)))
    assert (test_labels.bincount() >= 47).all()  # stratified: about 50 of each
    assert torch.equal(read_all(load_data("digits", "test"))[0], test)
    assert float(test.min()) == 0 and float(test.max()) == 1


def test_train_is_shuffled_by_torchs_seed_and_test_is_not() -> None:
    torch.manual_seed(1)
    first = read_all(load_data("digits", "train"))[1]
    second = read_all(load_data("digits", "train"))[1]
    torch.manual_seed(1)
    assert torch.equal(read_all(load_data("digits", "train"))[1], first)
    assert not torch.equal(first, second)
    assert [len(y) for _, y in load_data("digits", "test", batch_size=200)] == [200, 200, 100]


def test_normalisation_and_its_inverse() -> None:
    raw, _ = read_all(load_data("digits", "test"))
    got, _ = read_all(load_data("digits", "test", mean=0.3, std=(0.25,)))
    assert torch.equal(got, (raw - 0.3) / 0.25)
    assert torch.allclose(to_pixels(got, Threat(mean=(0.3,), std=(0.25,))), raw, atol=1e-6)


def test_size_resizes_tensors_and_keeps_the_range() -> None:
    raw, _ = read_all(load_data("digits", "test"))
    big, _ = read_all(load_data("digits", "test", size=12))
    assert big.shape == (500, 1, 12, 12)
    assert float(big.min()) >= 0 and float(big.max()) <= 1
    assert torch.allclose(big.mean((1, 2, 3)), raw.mean((1, 2, 3)), atol=0.02)
    assert torch.equal(read_all(load_data("digits", "test", size=8))[0], raw)


def test_augmentation_shifts_by_one_pixel_on_train_only_and_never_flips_digits() -> None:
    plain = load_data("digits", "train").dataset
    varied = load_data("digits", "train", augment=True).dataset
    torch.manual_seed(0)
    first = [varied[i][0] for i in range(60)]
    torch.manual_seed(0)
    assert all(torch.equal(varied[i][0], image) for i, image in enumerate(first))
    shifts = set()
    for i, image in enumerate(first):
        padded = torch.nn.functional.pad(plain[i][0], (1, 1, 1, 1))
        found = [(t, left) for t in range(3) for left in range(3)
                 if torch.equal(padded[:, t:t + 8, left:left + 8], image)]
        assert found
        shifts.add(found[0])
    assert len(shifts) == 9
    raw, _ = read_all(load_data("digits", "test"))
    assert torch.equal(read_all(load_data("digits", "test", augment=True))[0], raw)


@pytest.mark.parametrize(("spec", "name", "hint"), [
    ("fashion-mnist", "FashionMNIST", "apt-get install dataset-fashion-mnist"),
    ("mnist", "MNIST", "mnist:ROOT"),
    ("cifar10", "CIFAR10", "cifar10:ROOT"),
])
def test_failed_download_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str,
                                      name: str, hint: str) -> None:
    import torchvision.datasets

    def offline(self: object) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    monkeypatch.setattr(getattr(torchvision.datasets, name), "download", offline)
    with pytest.raises(DataError) as caught:
        load_data(spec, "test")
    assert hint in str(caught.value)
    assert f"{spec}:ROOT" in str(caught.value)
    assert "no route to host" in str(caught.value)


def test_cifar10_folder_as_torchvision_stores_it(tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    with pytest.raises(DataError, match="cifar-10-batches-py"):
        load_data(f"cifar10:{tmp_path}", "test")

    class Stub:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            self.data = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
            self.targets = [3, 1]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stub)
    images, labels = read_all(load_data(f"cifar10:{tmp_path}", "test"))
    assert images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [3, 1]
    assert float(images[0, 2, 0, 0]) == pytest.approx(2 / 255)
    varied = load_data(f"cifar10:{tmp_path}", "train", augment=True).dataset
    torch.manual_seed(0)
    rows = [varied[0][0][0, 16, 4:28].diff().sign().sum() for _ in range(20)]
    assert min(rows) < 0 < max(rows)  # some are flipped, some are not
