"""Batches of one image, which a BatchNorm cannot train on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from public_calls import Batches, harden
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

import quantguard as qg

pytestmark = pytest.mark.filterwarnings("ignore")


class Stream(IterableDataset[Any]):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter([self.data[i] for i in range(len(self.data))])


class Unsized:
    """An iterable of batches without a length."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(),
                         nn.Linear(16, 10)).eval()


LOADERS: dict[str, Callable[[TensorDataset], Any]] = {
    "list": lambda d: [(d.tensors[0][i:i + 16], d.tensors[1][i:i + 16]) for i in (0, 16, 32)],
    "first": lambda d: [(d.tensors[0][i:j], d.tensors[1][i:j]) for i, j in
                        ((0, 1), (1, 17), (17, 33))],
    "iterable": lambda d: Unsized([(d.tensors[0][i:i + 16], d.tensors[1][i:i + 16])
                                 for i in (0, 16, 32)]),
    "IterableDataset": lambda d: DataLoader(Stream(d), batch_size=16),
    "sampler": lambda d: DataLoader(d, batch_size=16, sampler=WeightedRandomSampler(
        torch.ones(33), 33)),
    "shuffled": lambda d: DataLoader(d, batch_size=16, shuffle=True)}


WAYS: dict[str, dict[str, Any]] = {
    "own lr": {"recipe": qg.Recipe("pgd", steps=1)}, "lr": {}, "ibp": {"recipe": "ibp"},
    "val": {"recipe": "clean", "val": True}, "float": {"bits": 32}}


@pytest.mark.parametrize(("kind", "way"), [
    pytest.param(kind, way, marks=[pytest.mark.slow] * (way != "own lr"))
    for kind in LOADERS for way in WAYS])
def test_a_single_image_batch_among_others_is_skipped(kind: str, way: str,
                                                 train_digits: TensorDataset) -> None:
    options = WAYS[way]
    loader = LOADERS[kind](TensorDataset(*(t[:33] for t in train_digits.tensors)))
    options = {**options, **({"val": LOADERS["list"](train_digits)} if "val" in options else {})}
    hardened = harden(normed(), loader, **options)
    assert all(v.isfinite().all() for v in hardened.state_dict().values())


@pytest.mark.parametrize("loader", [
    lambda d: [(d[i][0][None], d[i][1][None]) for i in range(8)],
    lambda d: DataLoader(d, batch_size=1)], ids=["list", "DataLoader"])
def test_only_single_image_batches_are_an_error(loader: Callable[[Any], Any],
                                                   train_digits: TensorDataset) -> None:
    with pytest.raises(qg.DataError, match="one image each(.|\n)*batches of two"):
        harden(normed(), loader(train_digits))


def test_without_batchnorm_single_image_batches_are_trained(
        cnn: nn.Module, batches: Batches) -> None:
    images, labels = batches[0]
    harden(cnn, [(images[i:i + 1], labels[i:i + 1]) for i in range(4)])
