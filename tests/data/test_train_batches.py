"""Training batches in a seeded order, and the images that are held out of them."""

from __future__ import annotations

import itertools
import random
import signal
from collections import UserDict
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from quantguard.core.errors import Interrupted
from quantguard.core.specs import Threat
from quantguard.data.batches import unpack
from quantguard.data.holdout import has_labels
from quantguard.data.loader import load_data
from quantguard.data.train_batches import SeededBatches, Source, hold_out
from quantguard.training import train_step as gradients
from quantguard.training.recipes import Recipe
from quantguard.training.trainer import fit

NUMBERS = TensorDataset(torch.arange(600))


def drawn(source: Source, epoch: int = 0, first: int = 0) -> list[int]:
    return [int(i) for batch in source.epoch(epoch, first) for i in batch[0]]


@pytest.mark.parametrize(("size", "num_held_out"), [
    (10_000, 500), (6000, 300), (5120, 256), (2000, 256), (1280, 256), (1000, 200), (100, 20),
    (5, 1), (4, 0)])
def test_five_per_cent_are_held_out_at_least_256_at_most_a_fifth(
        size: int, num_held_out: int) -> None:
    dataset = TensorDataset(torch.arange(size))
    with nullcontext() if num_held_out else pytest.warns(UserWarning, match="4 images are too few"):
        source = hold_out(DataLoader(dataset, batch_size=64), None, None, seed=0)
    trained = [int(i) for batch in source.epoch(0, 0) for i in batch[0]]
    held_out = [int(i) for batch in source.val for i in batch[0]] if source.val else []
    assert len(held_out) == num_held_out
    assert not set(trained) & set(held_out)
    # A last batch of one image is left out: it has no variance for BatchNorm.
    assert len(trained) == len(set(trained))
    assert size - num_held_out - len(trained) in (0, 1)


def test_the_slice_is_seeded_and_independent_of_torchs_random_numbers() -> None:
    loader = DataLoader(TensorDataset(torch.arange(500)), batch_size=64, shuffle=True)

    def slice_of(seed: int) -> set[int]:
        torch.rand(1)
        val = hold_out(loader, None, None, seed).val
        return {int(i) for batch in val or () for i in batch[0]}
    assert slice_of(0) == slice_of(0)
    assert slice_of(0) != slice_of(1)


def test_with_val_nothing_is_held_out_and_augmentation_stays_out_of_the_slice() -> None:
    loader: Any = load_data("digits", "train", batch_size=10, augment=True)
    dataset, size = loader.dataset, len(loader.dataset)
    source = hold_out(loader, [1], None, 0)
    assert source.val == [1] and source.batches == -(-size // 10)

    def same(data: Any) -> bool:  # two passes over the held-out images
        val: Any = hold_out(DataLoader(data, batch_size=10), None, None, 0).val
        return all(torch.equal(a[0], b[0]) for a, b in zip(val, val, strict=True))
    assert same(dataset) and same(Subset(dataset, range(100)))
    assert same(Subset(Subset(dataset, range(200)), range(100)))
    assert dataset.augment is True

    class Own(TensorDataset):  # an attribute of that name that is no switch
        augment = property(lambda self: pytest.fail("it was read"))
    assert hold_out(DataLoader(Own(torch.arange(100)), batch_size=10), None, None, 0).described()
    switched = TensorDataset(torch.arange(100))
    switched.augment = True  # type: ignore[attr-defined]
    held_out: Any = hold_out(DataLoader(switched, batch_size=10), None, None, 0).val
    assert held_out.dataset.dataset.augment is False
    assert switched.augment is True  # type: ignore[attr-defined]


def of(batches: Any, count: int = 512) -> list[int]:
    """Return the first numbers of some batches, as validation reads them."""
    found: list[int] = []
    for batch in batches:
        inputs, _ = unpack(batch)
        found += [int(i) for i in (inputs["x"] if isinstance(inputs, dict) else inputs)]
        if len(found) >= count:
            break
    return found


class Pair(NamedTuple):
    images: Tensor
    labels: Tensor


SORTED = TensorDataset(torch.arange(20_000))  # by class, if class is number // 2000


@pytest.mark.parametrize("val", [
    None, DataLoader(SORTED, 128), DataLoader(SORTED, 128, shuffle=True),
    [(batch, torch.zeros(100)) for batch in torch.arange(20_000).split(100)],
    [Pair(batch, torch.zeros(5)) for batch in torch.arange(20_000).split(5)],
    [UserDict(x=batch, labels=torch.zeros(100)) for batch in torch.arange(20_000).split(100)]])
def test_attacked_images_are_of_all_classes_and_the_same_each_time(val: Any) -> None:
    source = hold_out(DataLoader(SORTED, 64), val, None, 0)
    seen = of(source.some)
    assert 512 <= len(seen) < 512 + 128 and len(set(seen)) == len(seen)
    counts = [sum(i // 2000 == c for i in seen) for c in range(10)]
    assert min(counts) > 25 and max(counts) < 90
    torch.rand(1)
    assert of(source.some) == seen == of(hold_out(DataLoader(SORTED, 64), val, None, 0).some)
    # All images are still available.
    assert len(of(source.val, 10**6)) == (1000 if val is None else 20_000)


def test_few_held_out_images_are_all_attacked() -> None:
    val = [(torch.arange(n, n + 10), torch.zeros(10)) for n in range(0, 130, 10)]
    some = hold_out(DataLoader(SORTED, 64), val, None, 0).some
    assert of(some) == list(range(130)) and some is not None
    # Small batches are merged: each one would take an attack of its own.
    assert [len(images) for images, _ in some] == [120, 10]


def test_labelled_images_of_partly_labelled_ones_are_attacked() -> None:
    labels = torch.full((20_000,), -1)
    labels[[3, 777, 19_999]] = 1
    val = [*zip(torch.arange(20_000).split(100), labels.split(100), strict=True)]
    some = hold_out(DataLoader(SORTED, 64), val, None, 0).some
    assert some is not None
    assert [int(i) for x, y in some for i, label in zip(x, y, strict=True) if label >= 0] == [
        3, 777, 19_999]
    assert has_labels(val) and has_labels([]) and not has_labels([torch.zeros(3, 1)])
    assert not has_labels([(torch.zeros(3, 1), torch.full((3,), -1))])


def test_workers_draw_the_same_for_held_out_images_each_time() -> None:
    val = DataLoader(Draws(), batch_size=50, num_workers=1, drop_last=True)
    held_out: Any = hold_out(DataLoader(SORTED, 64), val, None, 0).val
    one, two = list(held_out), list(held_out)
    assert [len(x) for x, _ in one] == [50, 50]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, two, strict=True))


def test_batches_of_an_overridden_iterator_are_used_unchanged() -> None:
    class Doubled(DataLoader[Any]):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                yield [2 * batch[0]]

    class Plain(DataLoader[Any]):
        pass
    with pytest.warns(UserWarning, match="with its own __iter__"):
        source = hold_out(Doubled(NUMBERS, 50), None, None, 0)
    assert not source.resumable and drawn(source) == list(range(0, 1200, 2))
    assert hold_out(Plain(NUMBERS, 50), None, None, 0).resumable


def test_the_description_changes_with_images_and_held_out_images() -> None:
    x, y = torch.rand(100, 1, 2, 2), torch.arange(100) % 2

    def described(x: Tensor, val: Any = None, y: Tensor = y) -> Any:
        loaders: list[Any] = [DataLoader(TensorDataset(x, y), 50)]
        loaders.append([(x[:50], y[:50]), (x[50:], y[50:])])
        return [hold_out(loader, val or [(x, y)], None, 0).described() for loader in loaders]
    same, one = described(x), [(x, y)]
    assert described(x) == same == described(x, one)
    for other in (described(1 - x), described(x, y=1 - y), described(x, [(1 - x, y)]),
                  described(x, [(x, 1 - y)])):
        assert all(a != b for a, b in zip(other, same, strict=True))
    # Images that are random in every pass do not change the description.
    noisy = DataLoader(Fresh(), 50)
    assert hold_out(noisy, one, None, 0).described() == hold_out(noisy, one, None, 0).described()


class Fresh(Dataset[tuple[Tensor, Tensor]]):
    """Dataset of random images that do not depend on any of our seeds."""

    generator = torch.Generator()

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.rand(1, 2, 2, generator=self.generator), torch.tensor(index % 2)


def test_seeded_batches_can_start_at_any_batch() -> None:
    sampler = SeededBatches(23, 5, seed=1)
    whole = list(sampler)
    assert len(sampler) == len(whole) == 5
    assert sorted(itertools.chain(*whole)) == list(range(23))
    sampler.first = 2
    assert list(sampler) == whole[2:]
    sampler.first, sampler.epoch = 0, 1
    assert list(sampler) != whole
    assert list(SeededBatches(23, 5, seed=2)) != whole
    assert [len(b) for b in SeededBatches(21, 5, 0)] == [5, 5, 5, 5]
    assert [len(b) for b in SeededBatches(1, 5, 0)] == [1]


@pytest.mark.parametrize("sampler", [
    SubsetRandomSampler(range(300)), SubsetRandomSampler(list(range(0, 600, 2))),
    SequentialSampler(range(300)), RandomSampler(range(300))])
def test_a_subset_stays_a_subset(sampler: Any) -> None:
    source = hold_out(DataLoader(NUMBERS, 64, sampler=sampler), None, None, 0)
    assert source.resumable and source.val is not None
    trained, held_out = drawn(source), [int(i) for batch in source.val for i in batch[0]]
    every = list(sampler.indices) if isinstance(sampler, SubsetRandomSampler) else range(300)
    assert sorted(trained + held_out) == list(every) and len(held_out) == 60


@pytest.mark.parametrize(("options", "ours"), [
    ({"sampler": SequentialSampler(NUMBERS)}, True), ({"shuffle": True}, True),
    ({"sampler": SubsetRandomSampler([1, 2, 2])}, False),
    ({"sampler": RandomSampler(NUMBERS, num_samples=100)}, False),
    ({"sampler": RandomSampler(NUMBERS, replacement=True)}, False),
    ({"sampler": WeightedRandomSampler([1.0] * 60 + [0.0] * 540, 200)}, False),
    ({"batch_sampler": BatchSampler(range(100), 10, False)}, False)])
def test_an_unknown_sampler_is_used_unchanged(options: dict[str, Any], ours: bool) -> None:
    if "batch_sampler" not in options:
        options = {**options, "batch_size": 50}
    loader = DataLoader(NUMBERS, **options)
    with nullcontext() if ours else pytest.warns(UserWarning, match="a sampler of its own"):
        source = hold_out(loader, None, None, 0)
    assert source.resumable is ours and (source.loader is loader) is not ours


class Draws(Dataset[tuple[Tensor, Tensor]]):
    """Dataset with augmentation by torch's, numpy's and Python's random numbers."""

    def __len__(self) -> int:
        return 120

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(1, 4, 4) + numpy.random.rand() + random.random()
        return noise / 3, torch.tensor(index % 2)


def test_random_numbers_of_a_worker_depend_on_the_item_alone() -> None:
    def epoch(number: int, first: int) -> list[Tensor]:
        source = hold_out(DataLoader(Draws(), 16, num_workers=2), [1], None, 0)
        return [batch[0] for batch in source.epoch(number, first)]
    whole = epoch(1, 0)
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], epoch(1, 3), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole, epoch(2, 0), strict=True))
    assert len({float(x[0, 0, 0, 0]) for x in whole}) == len(whole)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(),
                         nn.Linear(8, 2)).eval()


def test_an_interrupted_run_with_workers_resumes_to_the_same_bits(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, calls = DataLoader(Draws(), 16, num_workers=1), [0]
    original = gradients.attacked_images

    def train(where: str) -> dict[str, Tensor]:
        net = small_net()
        fit(net, loader, Threat(eps=0.1), Recipe("clean", lr=1e-2), epochs=2, progress=False,
            run_dir=tmp_path / where)
        return net.state_dict()

    def attacked_images(*args: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 9:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(gradients, "attacked_images", attacked_images)
        with pytest.raises(Interrupted, match="epoch 2, batch 3"):
            train("run")
    alone = train("alone")
    assert all(torch.equal(v, alone[k]) for k, v in train("run").items())


def test_a_seed_sets_all_random_numbers_and_the_callers_are_restored() -> None:
    ends = []
    for other in (1, 2):
        random.seed(other)
        numpy.random.seed(other)
        expected = random.Random(other).random(), numpy.random.RandomState(other).rand()
        net = small_net()
        fit(net, DataLoader(Draws(), 16), Threat(eps=0.1), Recipe("clean", lr=1e-2), epochs=1,
            progress=False)
        assert (random.random(), numpy.random.rand()) == expected
        ends.append(net.state_dict())
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


class Streamed(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Any:
        return (((torch.ones(1, 4, 4) * (i % 7)) / 7, torch.tensor(i % 2)) for i in range(33))


def test_a_last_batch_of_one_image_is_left_out_of_training() -> None:
    with pytest.warns(UserWarning, match="nothing can be held out"):
        history = fit(small_net(), DataLoader(Streamed(), 16), Threat(eps=0.1),
                      Recipe("clean", lr=1e-3), epochs=2, progress=False)
    assert [e.epoch for e in history.epochs] == [0, 1, 2]
