"""More epochs of a finished run, and the ETA of a run."""

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

import quantguard as qg
from quantguard.cli.main import main
from quantguard.training import resumable_run, trainer
from quantguard.training.recipes import Recipe
from quantguard.training.train_step import TrainStep
from quantguard.training.trainer import fit

FAST = Recipe("pgd", steps=1, sharpness=(4.0,), lr=2e-3)
THREAT = qg.Threat(eps=0.1)


def run(model: nn.Module, loader: Any, epochs: int, path: Path | None = None,
        recipe: Recipe = FAST, **options: Any) -> tuple[nn.Module, Any]:
    clone = copy.deepcopy(model)
    return clone, fit(clone, loader, THREAT, recipe, epochs=epochs, run_dir=path, progress=False,
                     **options)


def test_more_epochs_resume_from_the_returned_weights(
        quantized: nn.Module, loader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = run(quantized, loader, 1, tmp_path)
    steps: list[tuple[int, float]] = []
    real = trainer.Trainer._step

    def step(self: Any, *args: Any) -> float:
        steps.append((self.epoch, self.optimizer.param_groups[0]["lr"]))
        return real(self, *args)
    monkeypatch.setattr(trainer.Trainer, "_step", step)
    _, second = run(quantized, loader, 3, tmp_path)
    assert [e.epoch for e in second.epochs] == [0, 1, 2, 3]
    assert second.epochs[:2] == first.epochs
    assert "2 more epochs after the first 1:" in " ".join(second.events)
    # only the new epochs, under one more schedule: up to the same peak, and down
    assert [epoch for epoch, _ in steps] == [1] * 5 + [2] * 5
    rates = [rate for _, rate in steps]
    assert max(rates) == pytest.approx(FAST.lr, rel=0.05)
    top = rates.index(max(rates))
    assert rates[0] < rates[top] and rates[-1] < rates[top]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"]["epochs"] == 3 and record["finished"]
    steps.clear()
    _, again = run(quantized, loader, 3, tmp_path)
    assert not steps and again.epochs == second.epochs


def test_an_interrupted_extension_resumes_to_the_same_bits(
        quantized: nn.Module, loader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "broken"):
        run(quantized, loader, 1, tmp_path / name)
    whole, _ = run(quantized, loader, 2, tmp_path / "whole")
    real, calls = TrainStep.__call__, []

    def press(self: Any, *args: Any) -> float:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", press)
        with pytest.raises(KeyboardInterrupt):
            run(quantized, loader, 2, tmp_path / "broken")
    broken, _ = run(quantized, loader, 2, tmp_path / "broken")
    one, two = whole.state_dict(), broken.state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_an_unfinished_run_is_finished_before_it_is_extended(
        quantized: nn.Module, loader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = TrainStep.__call__, []

    def press(self: Any, *args: Any) -> float:
        calls.append(0)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(self, *args)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", press)
        with pytest.raises(KeyboardInterrupt):
            run(quantized, loader, 2, tmp_path / "broken")
    run(quantized, loader, 2, tmp_path / "whole")
    whole, one = run(quantized, loader, 3, tmp_path / "whole")
    broken, two = run(quantized, loader, 3, tmp_path / "broken")
    assert [(e.epoch, e.loss, e.lr) for e in one.epochs] == [(e.epoch, e.loss, e.lr)
                                                             for e in two.epochs]
    assert all(torch.equal(v, broken.state_dict()[k]) for k, v in whole.state_dict().items())


def test_a_run_dir_of_an_older_version_is_extended(
        quantized: nn.Module, loader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(resumable_run, "SAVED", tuple(
            k for k in resumable_run.SAVED if k not in ("until", "grown")))
        run(quantized, loader, 1, tmp_path)
    assert len(run(quantized, loader, 2, tmp_path)[1].epochs) == 3


def test_fewer_epochs_are_refused(quantized: nn.Module, loader: Any,
                                                  tmp_path: Path) -> None:
    run(quantized, loader, 2, tmp_path)
    with pytest.raises(qg.SpecError, match=r"epochs \(2, now 1\)"):
        run(quantized, loader, 1, tmp_path)


def test_a_stage_that_others_start_from_is_not_extended(cnn: nn.Module, loader: Any,
                                                        tmp_path: Path) -> None:
    recipe = Recipe("pgd", steps=1, sharpness=(4.0,), lr=2e-3, bit_schedule=(4,), input_bits=0)
    options: dict[str, Any] = {"recipe": recipe, "run_dir": tmp_path, "progress": False}
    qg.harden(cnn, loader, THREAT, epochs=2, **options)
    qg.harden(cnn, loader, THREAT, epochs=3, **options)  # one more in the last stage
    with pytest.raises(qg.SpecError, match=r"epochs \(1, now 2\)"):
        qg.harden(cnn, loader, THREAT, epochs=4, **options)


def test_an_extension_of_certified_training_has_the_full_eps(loader: Any, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    from quantguard.cli.demo import certified_cnn
    from quantguard.training.certified import CertifiedObjective
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


def test_the_eta_does_not_count_the_delay_of_the_first_step(
        quantized: nn.Module, loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step may compile: here it takes two seconds, the others milliseconds."""
    real, calls = TrainStep.__call__, []

    def slow(self: Any, *args: Any) -> float:
        calls.append(0)
        time.sleep(2 if len(calls) == 1 else 0)
        return real(self, *args)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True
    stream = Terminal()
    monkeypatch.setattr(TrainStep, "__call__", slow)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("quantguard.core.progress._LIVE_EVERY", 0.0)
    clone = copy.deepcopy(quantized)
    fit(clone, loader, THREAT, FAST, epochs=2)
    lines = [line for line in stream.getvalue().replace("\r", "\n").splitlines() if "loss" in line]
    assert "left" not in lines[0]
    # 8 more steps at two seconds each would be 16
    seconds = [int(line.split(", ")[1].split(" s left")[0]) for line in lines[1:]]
    assert seconds and max(seconds) < 8
