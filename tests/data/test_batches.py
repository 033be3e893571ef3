"""Batches of a loader: unpacked, checked, mapped to pixels and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from quantguard.core.errors import DataError
from quantguard.core.specs import Threat
from quantguard.data.batches import (
    check_images,
    check_labels,
    from_pixels,
    require_reiterable,
    snap,
    to_pixels,
    unpack,
)


def test_unpack_takes_what_loaders_yield() -> None:
    x, y = torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])
    assert unpack(x) == (x, None)
    assert unpack((x,)) == (x, None)
    for batch in ((x, y), [x, y]):
        assert unpack(batch)[0] is x and unpack(batch)[1] is y
    for key in ("labels", "label"):
        batch = {"pixel_values": x, "mask": None, key: y}
        inputs, labels = unpack(batch)
        assert isinstance(inputs, dict)
        assert list(inputs) == ["pixel_values", "mask"] and labels is y
        assert key in batch  # the caller's dict is left as it is
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


def test_pixels_there_and_back_per_channel() -> None:
    threat = Threat(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    p = torch.rand(4, 3, 2, 2)
    x = from_pixels(p, threat)
    assert torch.allclose(x[:, 2], (p[:, 2] - 0.3) / 2)
    assert torch.allclose(to_pixels(x, threat), p, atol=1e-6)
    vectors = torch.rand(4, 3)
    assert torch.allclose(from_pixels(vectors, threat)[:, 1], vectors[:, 1] - 0.2)
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
