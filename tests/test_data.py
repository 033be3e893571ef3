"""DATA specs, batches, pixels and labels: what is read, and what each wrong input says."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from quantguard import sources
from quantguard.batches import (
    check_images,
    check_labels,
    from_pixels,
    require_reiterable,
    snap,
    to_pixels,
    unpack,
)
from quantguard.data import load_data
from quantguard.errors import DataError, SpecError
from quantguard.spec import Threat


def everything(loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


# --- load_data: settings ---


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


# --- digits ---


def test_digits_are_sklearns_split_once_and_for_all() -> None:
    from sklearn.datasets import load_digits

    train, train_labels = everything(load_data("digits", "train"))
    test, test_labels = everything(load_data("digits", "test"))
    assert train.shape == (1297, 1, 8, 8)
    assert test.shape == (500, 1, 8, 8)
    assert train.dtype == torch.float32 and train_labels.dtype == torch.int64
    source = load_digits()
    ours = sorted(map(bytes, torch.cat([train, test]).mul(16).byte().flatten(1).numpy()))
    assert ours == sorted(map(bytes, source.data.astype(np.uint8)))
    assert (test_labels.bincount() >= 47).all()  # stratified: about 50 of each
    assert torch.equal(everything(load_data("digits", "test"))[0], test)
    assert float(test.min()) == 0 and float(test.max()) == 1


def test_train_is_shuffled_by_torchs_seed_and_test_is_not() -> None:
    torch.manual_seed(1)
    first = everything(load_data("digits", "train"))[1]
    second = everything(load_data("digits", "train"))[1]
    torch.manual_seed(1)
    assert torch.equal(everything(load_data("digits", "train"))[1], first)
    assert not torch.equal(first, second)
    assert [len(y) for _, y in load_data("digits", "test", batch_size=200)] == [200, 200, 100]


def test_normalisation_and_its_inverse() -> None:
    raw, _ = everything(load_data("digits", "test"))
    got, _ = everything(load_data("digits", "test", mean=0.3, std=(0.25,)))
    assert torch.equal(got, (raw - 0.3) / 0.25)
    assert torch.allclose(to_pixels(got, Threat(mean=(0.3,), std=(0.25,))), raw, atol=1e-6)


def test_size_resizes_tensors_and_keeps_the_range() -> None:
    raw, _ = everything(load_data("digits", "test"))
    big, _ = everything(load_data("digits", "test", size=12))
    assert big.shape == (500, 1, 12, 12)
    assert float(big.min()) >= 0 and float(big.max()) <= 1
    assert torch.allclose(big.mean((1, 2, 3)), raw.mean((1, 2, 3)), atol=0.02)
    assert torch.equal(everything(load_data("digits", "test", size=8))[0], raw)


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
    raw, _ = everything(load_data("digits", "test"))
    assert torch.equal(everything(load_data("digits", "test", augment=True))[0], raw)


# --- IDX ---


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
    images, labels = everything(load_data(f"mnist:{tmp_path}", "test"))
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


def test_the_cache_is_read_before_any_download(tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_mnist(tmp_path / ".cache/quantguard/MNIST/raw", "train", 7)
    assert len(everything(load_data("mnist", "train"))[1]) == 7


def test_real_fashion_mnist() -> None:
    if not sources.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    loader = load_data("fashion-mnist", "test", batch_size=2000)
    images, labels = everything(loader)
    assert images.shape == (10000, 1, 28, 28)
    assert labels.bincount().tolist() == [1000] * 10
    assert abs(float(images.mean()) - 0.2868) < 1e-3  # 0.286 is the published training mean
    assert len(load_data("fashion-mnist", "train").dataset) == 60000


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
    images, labels = everything(load_data(f"cifar10:{tmp_path}", "test"))
    assert images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [3, 1]
    assert float(images[0, 2, 0, 0]) == pytest.approx(2 / 255)
    varied = load_data(f"cifar10:{tmp_path}", "train", augment=True).dataset
    torch.manual_seed(0)
    rows = [varied[0][0][0, 16, 4:28].diff().sign().sum() for _ in range(20)]
    assert min(rows) < 0 < max(rows)  # some are flipped, some are not


# --- npz ---


def npz(tmp_path: Path, **arrays: Any) -> str:
    content: dict[str, Any] = {"x_test": np.zeros((4, 3, 5, 5), np.uint8),
                               "y_test": np.arange(4), **arrays}
    np.savez(tmp_path / "d.npz", **{k: v for k, v in content.items() if v is not None})
    return f"npz:{tmp_path / 'd.npz'}"


def test_npz_uint8_and_floats(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 5), dtype=np.uint8)
    images, labels = everything(load_data(npz(tmp_path, x_test=pixels), "test"))
    assert torch.equal(images, torch.from_numpy(pixels).float().div(255))
    assert labels.tolist() == [0, 1, 2, 3]
    images, labels = everything(load_data(
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


def test_npz_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.npz does not exist"):
        load_data(f"npz:{tmp_path}/absent.npz", "test")
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(DataError, match="single array"):
        load_data(f"npz:{tmp_path}/a.npy", "test")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match="text.npz is no npz file"):
        load_data(f"npz:{tmp_path}/text.npz", "test")


# --- imagefolder ---


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
    images, labels = everything(load_data(f"imagefolder:{tmp_path}", "test"))
    assert images.shape == (6, 3, 8, 10)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and labels.dtype == torch.int64
    pixels = np.asarray(Image.open(tmp_path / "val/b/1.png"))
    assert torch.equal(images[4], torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255)


def test_imagefolder_keeps_greyscale_as_one_channel(tmp_path: Path) -> None:
    write_folder(tmp_path, mode="L")
    loader = load_data(f"imagefolder:{tmp_path}", "train", mean=[0.5], std=[0.5])
    assert everything(loader)[0].shape == (6, 1, 8, 10)
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
    assert everything(load_data(f"imagefolder:{tmp_path}", "test", size=6))[0].shape == (6, 3, 6, 6)


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


@pytest.mark.parametrize(("kept", "times"), [(1 << 30, 1), (0, 2)], ids=["small", "large"])
def test_imagefolder_reads_a_small_image_once(tmp_path: Path, kept: int, times: int,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    read: list[str] = []
    inner = sources._open_image

    def counted(path: str) -> Any:
        read.append(path)
        return inner(path)

    monkeypatch.setattr(sources, "_open_image", counted)
    monkeypatch.setattr(sources, "_KEPT", kept)
    loader = load_data(f"imagefolder:{tmp_path}", "test")
    images, _ = everything(loader)
    loader.dataset[0][0].zero_()  # who writes to an image has his own
    assert torch.equal(everything(loader)[0], images)
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
        everything(load_data(f"imagefolder:{tmp_path}", "test"))
    bad.write_bytes(b"no image")
    with pytest.raises(DataError, match="1.png is not a readable image"):
        load_data(f"imagefolder:{tmp_path}", "test")


# --- unpack, require_reiterable ---


def test_unpack_takes_what_loaders_yield() -> None:
    x, y = torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])
    assert unpack(x) == (x, None)
    assert unpack((x,)) == (x, None)
    for batch in ((x, y), [x, y]):
        assert unpack(batch)[0] is x and unpack(batch)[1] is y
    for key in ("labels", "label"):
        given = {"pixel_values": x, "mask": None, key: y}
        inputs, labels = unpack(given)
        assert isinstance(inputs, dict)
        assert list(inputs) == ["pixel_values", "mask"] and labels is y
        assert key in given  # the caller's dict is left as it is
    assert unpack({"x": x})[1] is None
    assert unpack(({"x": x}, y))[1] is y


@pytest.mark.parametrize(("batch", "message"), [
    ((torch.zeros(1),) * 3, "a tuple of 3: (Tensor, Tensor, Tensor)"),
    ([], "a list of 0"),
    ("images", "model input is a str"),
    ((torch.zeros(1), [1]), "labels are a list"),
    ((None, torch.zeros(1)), "model input is a NoneType"),
    ({"labels": torch.zeros(1)}, "without model inputs"),
    ({"x": torch.zeros(1), "label": 1, "labels": 1}, "both"),
    ({"x": torch.zeros(1), "label": 1}, "labels are a int"),
])
def test_unpack_refuses(batch: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        unpack(batch)
    assert message in str(caught.value)


def test_require_reiterable() -> None:
    x = torch.zeros(2, 3)
    loader = DataLoader(TensorDataset(x), shuffle=True)
    state = torch.get_rng_state()
    require_reiterable(loader, "data")
    require_reiterable([x], "data")
    assert torch.equal(torch.get_rng_state(), state)
    for once in (iter(loader), (b for b in [x]), map(abs, [x]), zip([x], strict=True)):
        with pytest.raises(DataError, match="val is a one-shot iterator"):
            require_reiterable(once, "val")
    for wrong in (x, 3, None):
        with pytest.raises(DataError, match="not a loader"):
            require_reiterable(wrong, "val")


# --- check_images, check_labels ---


def test_good_images_and_labels_pass() -> None:
    check_images(torch.tensor([-0.9e-4, 1 + 0.9e-4]), (0, 1), "here")
    check_images(torch.tensor([-0.02, 255.02]), (0, 255), "here")
    check_labels(torch.tensor([0, 9], dtype=torch.uint8), 10, "here")
    check_labels(torch.tensor([0, 99]), None, "here")
    check_labels(torch.zeros(0, dtype=torch.int64), 10, "here")


@pytest.mark.parametrize(("images", "bounds", "message"), [
    (torch.tensor([0.0, 255.0]), (0, 1), "divide them by 255, or use bounds=(0, 255)"),
    (torch.tensor([0.0, 255.0]), (0, 1), "0..255, outside 0..1"),
    (torch.tensor([-2.1, 2.6]), (0, 1), "give the mean= and std="),
    (torch.tensor([-2.1, 2.6]), (0, 1), "-2.1..2.6"),
    (torch.tensor([-1.5e-4, 1.0]), (0, 1), "outside 0..1"),
    (torch.tensor([0.0, 256.0]), (0, 255), "outside 0..255"),
    (torch.tensor([0.0, float("nan")]), (0, 1), "1 of 2 pixels are NaN"),
    (torch.tensor([0.0, float("inf")]), (0, 1), "1 of 2 pixels are NaN or infinite"),
    (torch.zeros(2, dtype=torch.uint8), (0, 1), "torch.uint8"),
    (torch.zeros(0, 3, 2, 2), (0, 1), "empty batch"),
])
def test_wrong_images(images: Tensor, bounds: tuple[float, float], message: str) -> None:
    with pytest.raises(DataError) as caught:
        check_images(images, bounds, "batch 3")
    assert message in str(caught.value)
    assert str(caught.value).startswith("batch 3: ")


@pytest.mark.parametrize(("labels", "message"), [
    (torch.tensor([0.0, 1.0]), "torch.float32 of shape (2,)"),
    (torch.zeros(2, 10, dtype=torch.int64), "labels.argmax(1)"),
    (torch.tensor(1), "shape ()"),
    (torch.tensor([True]), "torch.bool"),
    (torch.tensor([0, -1]), "-1..0"),
    (torch.tensor([1, 10]), "1..10, and must be 0..9: the model has 10 outputs"),
])
def test_wrong_labels(labels: Tensor, message: str) -> None:
    with pytest.raises(DataError) as caught:
        check_labels(labels, 10, "batch 3")
    assert message in str(caught.value)


# --- pixels ---


def test_pixels_there_and_back_per_channel() -> None:
    threat = Threat(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    p = torch.rand(4, 3, 2, 2)
    x = from_pixels(p, threat)
    assert torch.allclose(x[:, 2], (p[:, 2] - 0.3) / 2)
    assert torch.allclose(to_pixels(x, threat), p, atol=1e-6)
    flat = torch.rand(4, 3)
    assert torch.allclose(from_pixels(flat, threat)[:, 1], flat[:, 1] - 0.2)
    assert to_pixels(p, Threat()) is p
    with pytest.raises(DataError, match="mean has 3 numbers .* have 2 channels"):
        to_pixels(torch.rand(4, 2, 3, 3), threat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_snap_undoes_the_rounding_of_a_normalisation(dtype: torch.dtype) -> None:
    raw = torch.arange(256, dtype=torch.uint8).float().div(255).view(1, 1, 16, 16)
    raw = raw.repeat(1, 3, 1, 1)
    threat = Threat(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    back = to_pixels(from_pixels(raw.to(dtype), threat), threat)
    assert torch.equal(snap(back, (0, 1)), raw.to(dtype))
    if dtype == torch.float32:
        assert not torch.equal(back, raw)  # else this test shows nothing


def test_snap_leaves_other_pixels_alone() -> None:
    p = torch.tensor([0.5 / 255, 1 / 255 + 2e-6, -1 / 255, 256 / 255, float("nan")])
    assert torch.equal(snap(p, (0, 1)).nan_to_num(9), p.nan_to_num(9))
    levels = torch.arange(256.0)
    assert torch.equal(snap(levels + 1e-5 * (levels > 100), (0, 255)), levels)
    assert torch.equal(snap(torch.tensor([-1.0, 1.0 - 1e-6]), (-1, 1)), torch.tensor([-1.0, 1.0]))
