"""Interrupted and failed runs resume to the same bits."""

from __future__ import annotations

import copy
import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fine_tuning import FAST, THREAT, assert_same_run, loader_of, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from quantguard.conversion.converter import convert
from quantguard.core.errors import Interrupted, SpecError
from quantguard.core.progress import Progress
from quantguard.core.specs import Threat
from quantguard.training import train_step, trainer
from quantguard.training.history import History
from quantguard.training.objectives import Objective
from quantguard.training.recipes import Recipe
from quantguard.training.trainer import fit


def press() -> None:
    """Press Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


def press_twice() -> None:
    press()
    press()


def fail() -> None:
    raise OSError("died")


def at_call(calls: int, action: Callable[[], None],
            original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is like the original, but for what happens in one call."""
    count = itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if next(count) == calls:
            action()
        return result
    return call


class Noisy(TensorDataset):
    """Augments with torch's random numbers."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        items = [self[i] for i in indices]
        return [((x + 0.02 * torch.rand(())).clamp(0, 1), y) for x, y in items]


@pytest.fixture(scope="module")
def noisy(small: TensorDataset) -> DataLoader[Any]:
    return loader_of(Noisy(*small.tensors))


@pytest.fixture(scope="module")
def undisturbed(quantized: nn.Module, noisy: DataLoader[Any]) -> tuple[nn.Module, History]:
    return trained(quantized, noisy)


@pytest.mark.parametrize(("owner", "name", "calls", "action"), [
    (Noisy, "__getitems__", 9, press),  # eight calls describe the data
    (train_step, "attacked_images", 8, press), (Progress, "advance", 5, press),
    (trainer, "validate", 2, press), (trainer, "validate", 3, press),
    (Noisy, "__getitems__", 8, press_twice), (train_step, "attacked_images", 3, press_twice),
    (Progress, "advance", 2, press_twice), (trainer, "validate", 2, press_twice)],
    ids=lambda v: getattr(v, "__name__", str(v)))
def test_an_interrupted_run_resumes_to_the_same_bits(
        owner: Any, name: str, calls: int, action: Callable[[], None], quantized: nn.Module,
        noisy: DataLoader[Any], undisturbed: tuple[nn.Module, History], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, at_call(calls, action, getattr(owner, name)))
        with pytest.raises(Interrupted, match="saved in(.|\n)*same command again"):
            trained(quantized, noisy, run_dir=tmp_path)
    torch.rand(3)  # another process has other random numbers
    assert_same_run(trained(quantized, noisy, run_dir=tmp_path), undisturbed)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_failed_run_resumes_from_its_last_epoch_to_the_same_bits(
        quantized: nn.Module, noisy: DataLoader[Any], undisturbed: tuple[nn.Module, History],
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train_step, "attacked_images",
                      at_call(7, fail, train_step.attacked_images))
        with pytest.raises(OSError, match="died"):
            trained(quantized, noisy, run_dir=tmp_path)
    assert_same_run(trained(quantized, noisy, run_dir=tmp_path), undisturbed)


@pytest.mark.parametrize("calls", [pytest.param(2, marks=pytest.mark.slow), 7])
def test_a_run_over_a_list_of_batches_resumes_to_the_same_bits(
        calls: int, quantized: nn.Module, small: TensorDataset, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    batches = list(DataLoader(small, batch_size=64))
    val = batches[:1]
    whole = trained(quantized, batches, val=val)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", at_call(calls, press, Progress.advance))
        with pytest.raises(Interrupted, match="same command again"):
            trained(quantized, batches, val=val, run_dir=tmp_path)
    assert_same_run(trained(quantized, batches, val=val, run_dir=tmp_path), whole)


def test_a_finished_run_is_read_and_not_run_again(quantized: nn.Module, small: TensorDataset,
                                                  tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(quantized, loader_of(small), run_dir=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "metrics.jsonl", "run.json",
                                                          "training.pt"]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["finished"] and record["settings"]["epochs"] == 2
    assert record["chosen"] == whole[1].chosen and record["levels"] == whole[1].levels
    assert record["recipe"] == record["settings"]["recipe"] and record["environment"]["torch"]
    monkeypatch.setattr(Objective, "__call__", None)
    assert_same_run(trained(quantized, loader_of(small), run_dir=tmp_path), whole)


def test_ctrl_c_without_a_run_dir_recommends_one(quantized: nn.Module,
                                                               small: TensorDataset,
                                                               monkeypatch: pytest.MonkeyPatch,
                                                               ) -> None:
    monkeypatch.setattr(Progress, "advance", at_call(2, press, Progress.advance))
    with pytest.raises(Interrupted, match="nothing was saved(.|\n)*--run-dir") as caught:
        trained(quantized, loader_of(small))
    assert isinstance(caught.value, KeyboardInterrupt)


@pytest.mark.parametrize(("change", "name"), [
    ("eps", "threat"), ("recipe", "recipe"), ("epochs", r"epochs \(2, now 1\)"), ("seed", "seed"),
    ("train", "train"), ("batches", "data"), ("weights", "weights at the start"),
    ("model", "activations"),
    ("bits", r'activations \(\["2: 2 bits, dynamic"\], now \["2: 3 bits, dynamic"\]\)')])
def test_a_run_dir_of_other_settings_is_refused(change: str, name: str, cnn: nn.Module,
                                                quantized: nn.Module, small: TensorDataset,
                                                tmp_path: Path) -> None:
    model, threat, recipe, data = copy.deepcopy(quantized), THREAT, FAST, small
    options: dict[str, Any] = {"epochs": 1 + (change == "epochs"), "seed": 0, "train": "all",
                               "progress": False}
    fit(model, loader_of(data), threat, recipe, run_dir=tmp_path, **options)
    model = copy.deepcopy(cnn if change == "model" else quantized)
    if change == "bits":
        model = convert(cnn, {"*": 2, "first": 3}, dynamic=True)
    if change == "weights":
        with torch.no_grad():
            model[0].weight.add_(0.1)
    threat = Threat(eps=0.2) if change == "eps" else threat
    recipe = Recipe("pgd", steps=2, lr=1e-3) if change == "recipe" else recipe
    options |= {"epochs": {"epochs": 1}, "seed": {"seed": 1}, "train": {"train": "thresholds"}}.get(
        change, {})
    data = TensorDataset(*(t[:200] for t in small.tensors)) if change == "batches" else data
    with pytest.raises(SpecError, match=f"other settings(.|\n)*{name}(.|\n)*another run directory"):
        fit(model, loader_of(data), threat, recipe, run_dir=tmp_path, **options)
