"""A finished run that gets more epochs goes on from what it returned; and what its ETA counts."""

from __future__ import annotations

import copy
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard import training
from quantguard.cli import main
from quantguard.gradients import Gradients
from quantguard.recipes import Recipe
from quantguard.training import fit

FAST = Recipe("pgd", steps=1, sharpness=(4.0,), lr=2e-3)
THREAT = qg.Threat(eps=0.1)


@pytest.fixture(scope="module")
def loader(train_digits: TensorDataset) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*(t[:400] for t in train_digits.tensors)), batch_size=64,
                      shuffle=True)


def run(model: nn.Module, loader: Any, epochs: int, path: Path | None = None,
        recipe: Recipe = FAST, **options: Any) -> tuple[nn.Module, Any]:
    twin = copy.deepcopy(model)
    return twin, fit(twin, loader, THREAT, recipe, epochs=epochs, run_dir=path, progress=False,
                     **options)


def test_more_epochs_go_on_from_what_was_returned(quantized: nn.Module, loader: Any, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = run(quantized, loader, 1, tmp_path)
    steps: list[tuple[int, float]] = []
    real = training.Trainer._step

    def step(self: Any, *args: Any) -> float:
        steps.append((self.epoch, self.optimizer.param_groups[0]["lr"]))
        return real(self, *args)
    monkeypatch.setattr(training.Trainer, "_step", step)
    _, second = run(quantized, loader, 3, tmp_path)
    assert [e.epoch for e in second.epochs] == [0, 1, 2, 3]
    assert second.epochs[:2] == first.epochs
    assert "2 more epochs after the 1" in " ".join(second.events)
    # the new epochs alone, under one more course of the rate: up to the same peak, and down
    assert [epoch for epoch, _ in steps] == [1] * 5 + [2] * 5
    rates = [rate for _, rate in steps]
    assert max(rates) == pytest.approx(FAST.lr, rel=0.05)
    top = rates.index(max(rates))
    assert rates[0] < rates[top] and rates[-1] < rates[top]
    told = json.loads((tmp_path / "run.json").read_text())
    assert told["settings"]["epochs"] == 3 and told["finished"]
    steps.clear()
    _, again = run(quantized, loader, 3, tmp_path)
    assert not steps and again.epochs == second.epochs


def test_an_extension_that_was_interrupted_goes_on_to_the_same_bits(
        quantized: nn.Module, loader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "broken"):
        run(quantized, loader, 1, tmp_path / name)
    whole, _ = run(quantized, loader, 2, tmp_path / "whole")
    real, calls = Gradients.__call__, []

    def press(self: Any, *args: Any) -> float:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)
    with monkeypatch.context() as patch:
        patch.setattr(Gradients, "__call__", press)
        with pytest.raises(KeyboardInterrupt):
            run(quantized, loader, 2, tmp_path / "broken")
    broken, _ = run(quantized, loader, 2, tmp_path / "broken")
    one, two = whole.state_dict(), broken.state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_an_unfinished_run_ends_as_it_was_planned_before_it_is_extended(
        quantized: nn.Module, loader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Gradients.__call__, []

    def press(self: Any, *args: Any) -> float:
        calls.append(0)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(self, *args)
    with monkeypatch.context() as patch:
        patch.setattr(Gradients, "__call__", press)
        with pytest.raises(KeyboardInterrupt):
            run(quantized, loader, 2, tmp_path / "broken")
    run(quantized, loader, 2, tmp_path / "whole")
    whole, one = run(quantized, loader, 3, tmp_path / "whole")
    broken, two = run(quantized, loader, 3, tmp_path / "broken")
    assert [(e.epoch, e.loss, e.lr) for e in one.epochs] == [(e.epoch, e.loss, e.lr)
                                                             for e in two.epochs]
    assert all(torch.equal(v, broken.state_dict()[k]) for k, v in whole.state_dict().items())


def test_a_run_from_before_there_were_extensions_is_extended(
        quantized: nn.Module, loader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(training, "_KEPT", tuple(k for k in training._KEPT
                                               if k not in ("until", "grown")))
        run(quantized, loader, 1, tmp_path)
    assert len(run(quantized, loader, 2, tmp_path)[1].epochs) == 3


def test_fewer_epochs_than_there_were_are_refused(quantized: nn.Module, loader: Any,
                                                  tmp_path: Path) -> None:
    run(quantized, loader, 2, tmp_path)
    with pytest.raises(qg.SpecError, match=r"epochs \(2, now 1\)"):
        run(quantized, loader, 1, tmp_path)


def test_a_stage_that_others_start_from_is_not_extended(cnn: nn.Module, loader: Any,
                                                        tmp_path: Path) -> None:
    recipe = Recipe("pgd", steps=1, sharpness=(4.0,), lr=2e-3, walk=(4,), input_bits=0)
    options: dict[str, Any] = {"recipe": recipe, "run_dir": tmp_path, "progress": False}
    qg.harden(cnn, loader, THREAT, epochs=2, **options)
    qg.harden(cnn, loader, THREAT, epochs=3, **options)  # one more in the last stage
    with pytest.raises(qg.SpecError, match=r"epochs \(1, now 2\)"):
        qg.harden(cnn, loader, THREAT, epochs=4, **options)


def test_what_certified_training_grows_has_grown(loader: Any, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    from quantguard.certifying import CertifiedObjective
    from quantguard.demo import certified_cnn
    seen: list[float] = []
    real = CertifiedObjective.at

    def at(self: CertifiedObjective, progress: float) -> None:
        real(self, progress)
        seen.append(self.eps)
    monkeypatch.setattr(CertifiedObjective, "at", at)
    torch.manual_seed(0)
    model = certified_cnn()
    run(model, loader, 1, tmp_path, Recipe("ibp"))
    assert seen[0] == 0
    seen.clear()
    run(model, loader, 2, tmp_path, Recipe("ibp"))
    assert seen == [THREAT.eps] * 5


@pytest.mark.slow
def test_the_command_line_extends_a_run(cnn: nn.Module, tmp_path: Path) -> None:
    torch.save(cnn, tmp_path / "m.pt")
    for epochs in "12":
        done = CliRunner().invoke(main, [
            "harden", str(tmp_path / "m.pt"), "--data", "digits", "--recipe", "nfgsm", "--epochs",
            epochs, "--run-dir", str(tmp_path / "run"), "--force", "-o", str(tmp_path / "o.qg")])
        assert done.exit_code == 0, done.output
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_eta_leaves_out_what_the_first_step_waits_for(
        quantized: nn.Module, loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler, say: here a first step of two seconds, others of milliseconds."""
    real, calls = Gradients.__call__, []

    def slow(self: Any, *args: Any) -> float:
        calls.append(0)
        time.sleep(2 if len(calls) == 1 else 0)
        return real(self, *args)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True
    stream = Terminal()
    monkeypatch.setattr(Gradients, "__call__", slow)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("quantguard.progress._LIVE_EVERY", 0.0)
    twin = copy.deepcopy(quantized)
    fit(twin, loader, THREAT, FAST, epochs=2)
    lines = [line for line in stream.getvalue().replace("\r", "\n").splitlines() if "loss" in line]
    assert "left" not in lines[0]
    # 8 more steps at two seconds each would be 16
    seconds = [int(line.split(", ")[1].split(" s left")[0]) for line in lines[1:]]
    assert seconds and max(seconds) < 8
