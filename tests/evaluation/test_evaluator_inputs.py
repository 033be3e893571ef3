"""Loaders and models that the evaluator accepts, and the errors for those that it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_suites import ONES, Digits, Untouched, X, batches, measured
from torch import Tensor, nn
from torch.utils.data import DataLoader

from quantguard.attacks import PGD
from quantguard.core.errors import ConversionError, DataError
from quantguard.core.specs import Threat


@pytest.mark.slow
def test_every_form_of_batch_gives_the_same_images(quantized: nn.Module, digits: Digits) -> None:
    x, y = digits[0][:20], digits[1][:20]
    expected = measured(quantized, [(x, y)], suite=[PGD("ce", 2)])
    forms: list[Any] = [
        [[x, y]], [{"input": x, "labels": y}], [{"label": y, "input": x}], [(x, y.int())],
        [(x[:3], y[:3]), (x[3:], y[3:])], [(x.double(), y)], ((x, y),),
        DataLoader([{"input": a, "labels": b} for a, b in zip(x, y, strict=True)], batch_size=6)]
    for form in forms:
        other = measured(quantized, form, suite=[PGD("ce", 2)])
        assert np.array_equal(other.adversarials, expected.adversarials)


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.wrap = model, wrap

    def forward(self, pixel_values: Tensor) -> Any:
        return self.wrap(self.model(pixel_values))


@pytest.mark.parametrize(("dtype", "apart"), [
    pytest.param(torch.float64, 1, marks=pytest.mark.slow), (torch.bfloat16, 3)])
def test_models_of_other_precision_are_attacked_as_they_are(
        dtype: torch.dtype, apart: int, cnn: nn.Module, digits: Digits) -> None:
    other = copy.deepcopy(cnn).to(dtype)
    one = measured(cnn, batches(digits, 64))
    for loader in (batches(digits, 64), batches((digits[0].to(torch.float64), digits[1]), 64)):
        two = measured(other, loader)
        assert next(other.parameters()).dtype == dtype
        assert abs(int(one.survived.sum()) - int(two.survived.sum())) <= apart


@pytest.mark.parametrize("wrap", [lambda z: (z, "more"), lambda z: {"logits": z, "x": 1}])
def test_tuples_and_dicts_of_logits_are_read(wrap: Callable[[Tensor], Any], quantized: nn.Module,
                                             digits: Digits) -> None:
    x, y = digits[0][:20], digits[1][:20]
    expected = measured(quantized, [(x, y)], suite=[PGD("ce", 2)])
    other = measured(Wrapped(quantized, wrap).eval(), [{"pixel_values": x, "labels": y}],
                     suite=[PGD("ce", 2)])
    assert np.array_equal(other.adversarials, expected.adversarials)


class Nan(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.flatten(1)[:, :1] > 2, 0.0, float("nan")) + self.model(x)


def test_nan_logits_and_other_outputs_are_errors(cnn: nn.Module, digits: Digits) -> None:
    with pytest.raises(ConversionError, match="NaN logits(.|\n)*image 0"):
        measured(Nan(cnn).eval(), batches(digits, 5))
    with pytest.raises(ConversionError, match="logits"):
        measured(nn.Sequential(cnn, nn.Flatten(0)).eval(), batches(digits, 5))


def _generator() -> Iterator[Digits]:
    yield X, ONES


@pytest.mark.parametrize(("loader", "message"), [
    ([(X * 255, ONES)], r"batch 0(.|\n)*0\.\.255: divide them by 255"),
    ([(X, ONES), ((X * 255).byte(), ONES)], r"batch 1(.|\n)*divide them by 255"),
    ([((X - 0.5) / 0.5, ONES)], r"batch 0(.|\n)*normalised: give the mean= and std="),
    ([(X, ONES), (X / 0, ONES)], "batch 1.*NaN or infinite"),
    ([(torch.where(X > 0.9, torch.nan, X), ONES)], "batch 0.*NaN or infinite"),
    ([(X, ONES * 10)], r"labels are 10\.\.10.*0\.\.9: the model has 10 outputs"),
    ([(X, ONES), (X, ONES - 2)], r"batch 1.*labels are -1\.\.-1"),
    ([(X, ONES.float())], "batch 0.*labels are torch.float32"),
    ([(X, torch.eye(10)[:4])], "argmax"),
    ([(X, ONES), (X, ONES[:3])], "batch 1.*4 images and 3 labels"),
    ([(X[:, 0, 0, 0], ONES)], r"shape \(4,\)"),
    ([(X.repeat(1, 3, 1, 1), ONES)], r"does not accept inputs of shape \(4, 3, 8, 8\)"),
    ([(torch.rand(4, 1, 9, 9).repeat(1, 1, 2, 2), ONES)], "does not accept inputs of shape"),
    ([], "the loader is empty"), ([X], "batch 0.*has no labels"), ([(X,)], "has no labels"),
    ([(X, ONES, ONES)], "tuple of 3"), ([(X, [1, 1, 1, 1])], "labels are a list"),
    ([{"labels": ONES}], "without model inputs"),
    ([{"input": X, "mask": X, "labels": ONES}], "'input', 'mask' beside the labels"),
    (_generator(), r"one-shot iterator \(generator\)"), (X, "Tensor, not a loader"),
    (7, "int, not a loader"),
], ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_the_error_of_every_wrong_loader(loader: Any, message: str, cnn: nn.Module,
                                         untouched: Untouched) -> None:
    with untouched(cnn), pytest.raises(DataError, match=message):
        measured(cnn, loader)


def test_three_channel_models_and_statistics_do_not_accept_grey_images(cnn: nn.Module) -> None:
    rgb = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    with pytest.raises(DataError, match=r"does not accept(.|\n)*channels"):
        measured(rgb, [(X, ONES)])
    with pytest.raises(DataError, match="mean has 3 numbers.*1 channels"):
        measured(cnn, [(X, ONES)], Threat(mean=(0.5,) * 3, std=(0.5,) * 3))
