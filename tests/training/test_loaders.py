"""Loaders and held-out batches of every kind, and errors in them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fine_tuning import FAST, assert_same_run, loader_of, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from quantguard.core.errors import DataError
from quantguard.training.recipes import Recipe


def test_a_list_of_batches_warns_once_and_trains(quantized: nn.Module,
                                                 small: TensorDataset) -> None:
    batches = list(DataLoader(small, batch_size=64))
    with pytest.warns(UserWarning, match="nothing can be held out(.|\n)*val=") as record:
        model, history = trained(quantized, batches)
    assert len(record) == 1
    assert history.chosen == 2 and history.epochs[-1].clean is None
    assert not torch.equal(model[0].weight, quantized[0].weight)


def test_dicts_and_streams_train_as_well(quantized: nn.Module, small: TensorDataset) -> None:
    dicts = [{"input": x, "labels": y} for x, y in small]
    one = trained(quantized, loader_of(dicts), epochs=1)  # type: ignore[arg-type]
    assert_same_run(one, trained(quantized, loader_of(small), epochs=1))

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(small)

    loader = DataLoader(Stream(), batch_size=64)
    val = list(DataLoader(small, batch_size=64))[:1]
    _, history = trained(quantized, loader, epochs=2, val=val)
    assert [e.epoch for e in history.epochs] == [0, 1, 2]


@pytest.mark.parametrize("length", [3, 30])
@pytest.mark.parametrize("recipe", [FAST, Recipe("ibp", lr=1e-3)], ids=["one cycle", "ibp"])
def test_a_wrong_loader_length_is_logged_and_does_not_end_the_run(
        length: int, recipe: Recipe, quantized: nn.Module, small: TensorDataset) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(small)

        def __len__(self) -> int:
            return 64 * length

    val = list(DataLoader(small, batch_size=64))[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about the length, too
        model, history = trained(quantized, DataLoader(Stream(), batch_size=64), val=val,
                                 recipe=recipe)
    assert [e.epoch for e in history.epochs] == [0, 1, 2]
    assert f"an epoch had 7 batches, but the loader's length is {length}" in history.events[0]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("labels", ["none", "-1"])
def test_images_without_labels_train_from_a_data_loader_too(labels: str, quantized: nn.Module,
                                                            small: TensorDataset) -> None:
    x = small.tensors[0]
    data = TensorDataset(x) if labels == "none" else TensorDataset(x, torch.full((len(x),), -1))
    model, history = trained(quantized, loader_of(data), epochs=1,
                             recipe=Recipe("pgd", steps=1, lr=1e-3, distill=1.0))
    assert "no held-out image has a label" in history.events[0]
    assert history.epochs[-1].clean is None and history.chosen == 1
    assert not torch.equal(model[0].weight, quantized[0].weight)


def test_a_held_out_batch_without_labels_is_skipped(quantized: nn.Module,
                                                           small: TensorDataset) -> None:
    class Strict(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x)  # an empty batch cannot be reshaped
            return super().forward(x)  # type: ignore[no-any-return]

    x, y = small.tensors
    val = [(x[:10], torch.full((10,), -1)), (x[10:40], y[10:40])]
    recipe = Recipe("nfgsm", lr=1e-3, distill=0.5)
    _, history = trained(Strict(*copy.deepcopy(quantized)), loader_of(small), epochs=1, val=val,
                         recipe=recipe)
    assert history.epochs[-1].clean is not None


def broken(kind: str, x: Tensor, y: Tensor) -> Any:
    return {"nan": (torch.where(x > 0.9, torch.nan, x), y), "range": (x * 255, y),
            "labels": (x, y + 5), "negative": (x, y - 5), "float labels": (x, y.float()),
            "channels": (x.repeat(1, 3, 1, 1), y), "size": (x[..., :5, :5], y),
            "lengths": (x, y[:-1]), "unlabelled": x, "one-hot": (x, torch.eye(10)[y])}[kind]


@pytest.mark.parametrize("place", [0, 2, 6])
@pytest.mark.parametrize("kind", ["nan", "range", "labels", "negative", "float labels", "channels",
                                  "size", "lengths", "unlabelled", "one-hot"])
@pytest.mark.parametrize("lr", [None, 1e-3])
def test_a_bad_batch_is_named(kind: str, place: int, lr: float | None, cnn: nn.Module,
                              small: TensorDataset) -> None:
    batches: list[Any] = list(DataLoader(small, batch_size=40))
    val = batches[:1]
    batches[place] = broken(kind, *batches[place])
    with pytest.raises(DataError, match=f"batch {place}"):
        trained(cnn, batches, epochs=1, val=val, recipe=Recipe("pgd", steps=1, lr=lr))


@pytest.mark.parametrize("kind", ["nan", "labels", "channels", "unlabelled", "negative", "lengths",
                                  "float labels", "one-hot"])
def test_a_bad_batch_of_val_is_named_as_such(kind: str, cnn: nn.Module,
                                             small: TensorDataset) -> None:
    batches = list(DataLoader(small, batch_size=64))
    with pytest.raises(DataError, match="batch 1 of val"):
        trained(cnn, batches, epochs=1, val=[batches[0], broken(kind, *batches[1])])


@pytest.mark.parametrize(("loader", "message"), [
    ([], "the loader is empty"), (iter([]), "one-shot iterator"),
    (DataLoader(TensorDataset(torch.zeros(0, 1, 8, 8))), "empty")])
def test_empty_loaders_are_refused(loader: Any, message: str, cnn: nn.Module,
                                   small: TensorDataset) -> None:
    with pytest.raises(DataError, match=message):
        trained(cnn, loader, val=list(DataLoader(small, batch_size=64)))


@pytest.mark.parametrize("val", [[], iter([])], ids=["empty", "one-shot"])
def test_an_empty_val_is_refused(val: Any, cnn: nn.Module, small: TensorDataset) -> None:
    with pytest.raises(DataError, match="val"):
        trained(cnn, loader_of(small), val=val)
