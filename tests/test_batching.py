"""Which images train, in which order, and which are held out."""

from __future__ import annotations

import itertools
import random
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

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

from quantguard import gradients
from quantguard.batching import SeededBatches, Source, hold_out
from quantguard.errors import Interrupted
from quantguard.recipes import Recipe
from quantguard.spec import Threat
from quantguard.training import fit

NUMBERS = TensorDataset(torch.arange(600))


def drawn(source: Source, epoch: int = 0, first: int = 0) -> list[int]:
    return [int(i) for batch in source.epoch(epoch, first) for i in batch[0]]


@pytest.mark.parametrize(("size", "held"), [
    (10_000, 500), (6000, 300), (5120, 256), (2000, 256), (1280, 256), (1000, 200), (100, 20),
    (5, 1), (4, 0)])
def test_five_per_cent_are_held_out_at_least_256_at_most_a_fifth(size: int, held: int) -> None:
    dataset = TensorDataset(torch.arange(size))
    with nullcontext() if held else pytest.warns(UserWarning, match="4 images are too few"):
        source = hold_out(DataLoader(dataset, batch_size=64), None, None, seed=0)
    kept = [int(i) for batch in source.epoch(0, 0) for i in batch[0]]
    apart = [int(i) for batch in source.val for i in batch[0]] if source.val else []
    assert len(apart) == held
    assert not set(kept) & set(apart)
    # A last batch of one image is left out: it has no variance for BatchNorm.
    assert len(kept) == len(set(kept)) and size - held - len(kept) in (0, 1)


def test_the_slice_is_seeded_and_independent_of_torchs_random_numbers() -> None:
    loader = DataLoader(TensorDataset(torch.arange(500)), batch_size=64, shuffle=True)

    def slice_of(seed: int) -> set[int]:
        torch.rand(1)
        val = hold_out(loader, None, None, seed).val
        return {int(i) for batch in val or () for i in batch[0]}
    assert slice_of(0) == slice_of(0)
    assert slice_of(0) != slice_of(1)


def test_with_val_nothing_is_held_out_and_augmentation_stays_out_of_the_slice() -> None:
    class Augmented(TensorDataset):
        augment = True

    dataset = Augmented(torch.arange(100))
    source = hold_out(DataLoader(dataset, batch_size=10), [1], None, 0)
    assert source.val == [1] and source.batches == 10
    own = hold_out(DataLoader(dataset, batch_size=10), None, None, 0)
    assert isinstance(own.val, DataLoader) and isinstance(own.val.dataset, Subset)
    assert own.val.dataset.dataset.augment is False  # type: ignore[attr-defined]
    assert dataset.augment is True


def test_seeded_batches_are_an_order_that_can_be_entered_anywhere() -> None:
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
    SubsetRandomSampler(range(300)), SubsetRandomSampler(list(range(0, 600, 2)))])
def test_a_subset_stays_a_subset(sampler: SubsetRandomSampler) -> None:
    source = hold_out(DataLoader(NUMBERS, 64, sampler=sampler), None, None, 0)
    assert source.resumable and source.val is not None
    kept, held = drawn(source), [int(i) for batch in source.val for i in batch[0]]
    assert sorted(kept + held) == list(sampler.indices) and len(held) == 60


@pytest.mark.parametrize(("options", "ours"), [
    ({"sampler": SequentialSampler(NUMBERS)}, True), ({"shuffle": True}, True),
    ({"sampler": RandomSampler(NUMBERS, num_samples=100)}, False),
    ({"sampler": RandomSampler(NUMBERS, replacement=True)}, False),
    ({"sampler": WeightedRandomSampler([1.0] * 60 + [0.0] * 540, 200)}, False),
    ({"batch_sampler": BatchSampler(range(100), 10, False)}, False)])
def test_a_sampler_that_is_not_known_draws_as_it_does(options: dict[str, Any], ours: bool) -> None:
    if "batch_sampler" not in options:
        options = {**options, "batch_size": 50}
    loader = DataLoader(NUMBERS, **options)
    with nullcontext() if ours else pytest.warns(UserWarning, match="a sampler of its own"):
        source = hold_out(loader, None, None, 0)
    assert source.resumable is ours and (source.loader is loader) is not ours


class Draws(Dataset[tuple[Tensor, Tensor]]):
    """Augment by torch's, numpy's and Python's random numbers."""

    def __len__(self) -> int:
        return 120

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(1, 4, 4) + numpy.random.rand() + random.random()
        return noise / 3, torch.tensor(index % 2)


def test_what_a_worker_draws_is_the_items_own() -> None:
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


def test_a_run_with_workers_that_is_interrupted_goes_on_to_the_same_bits(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, calls, kept = DataLoader(Draws(), 16, num_workers=1), [0], gradients.craft

    def train(where: str) -> dict[str, Tensor]:
        net = small_net()
        fit(net, loader, Threat(eps=0.1), Recipe("clean", lr=1e-2), epochs=2, progress=False,
            run_dir=tmp_path / where)
        return net.state_dict()

    def craft(*args: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 9:
            signal.raise_signal(signal.SIGINT)
        return kept(*args)

    with monkeypatch.context() as patch:
        patch.setattr(gradients, "craft", craft)
        with pytest.raises(Interrupted, match="epoch 2, batch 3"):
            train("run")
    alone = train("alone")
    assert all(torch.equal(v, alone[k]) for k, v in train("run").items())


def test_a_seed_governs_all_random_numbers_and_the_callers_stay() -> None:
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


def test_a_rest_of_one_image_is_left_out_of_training() -> None:
    with pytest.warns(UserWarning, match="nothing can be held out"):
        history = fit(small_net(), DataLoader(Streamed(), 16), Threat(eps=0.1),
                      Recipe("clean", lr=1e-3), epochs=2, progress=False)
    assert [e.epoch for e in history.epochs] == [0, 1, 2]
