"""quantguard harden, ablate and demo."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from command_line import EVALUATE, HARDEN, fails, succeeds

import quantguard as qg
from quantguard.cli import demo
from quantguard.core.progress import Progress
from quantguard.nn.quant_activation import quantizers


def test_harden_converts_trains_and_writes(model: str, data: str) -> None:
    text = succeeds("harden", model, "--data", data, *HARDEN, "--dynamic", "--run-dir",
                    "run")
    assert "wrote model.hardened.qg" in text
    loaded = qg.load("model.hardened.qg")
    assert {(name == "input_staircase.staircase", m.spec.bits, m.spec.dynamic)
            for name, m in quantizers(loaded).items()} == {(True, 8, False), (False, 2, True)}
    assert sorted(os.listdir("run")) == [".lock", "metrics.jsonl", "run.json", "training.pt"]
    again = "harden", "model.hardened.qg", "--data", data, "--train", "thresholds", "-o", \
        "again.qg", "--recipe", "nfgsm", "--augment", "--epochs", "1", "--eps", "0.1"
    assert "has no lr: weights are not trained" in fails(*again, "--set", "lr=1e-3")
    succeeds(*again)
    control = "harden", model, "--data", data, *HARDEN, "--bits", "32", "-o", "control.qg"
    assert "a quantizer of 8 bits is placed on the input" in succeeds(*control)
    assert list(quantizers(qg.load("control.qg"))) == ["input_staircase.staircase"]
    succeeds(*control, "--set", "input_bits=0", "--force")
    assert not quantizers(qg.load("control.qg"))
    succeeds("harden", model, "--data", data, *HARDEN, "--bits", "first=4", "-o", "mixed.qg",
             "--set", "input_bits=0")
    assert [m.spec.bits for m in quantizers(qg.load("mixed.qg")).values()] == [4, 2, 2, 2]
    # the last match counts, also if the pattern was there before
    succeeds("convert", model, "--bits", "first=4", "--bits", "3", "-o", "last.qg")
    assert {m.spec.bits for m in quantizers(qg.load("last.qg")).values()} == {3}


@pytest.mark.slow
def test_ablate_shows_four_rows_and_writes_the_hardened_model(model: str, data: str) -> None:
    text = succeeds("ablate", model, "--data", data, *HARDEN, "--dynamic", "--suite", "quick",
                    "--images", "8", "-o", "out.qg", "--json", "a.json", "--run-dir", "run")
    written = json.loads(Path("a.json").read_text())
    assert list(written["rows"]) == ["float", "float + fine-tune", "2-bit dynamic",
                                  "2-bit dynamic + fine-tune"]
    assert "2-bit dynamic + fine-tune" in text
    assert len(quantizers(qg.load("out.qg"))) == 5


@pytest.mark.slow
def test_demo_trains_compares_and_leaves_model_and_reports(here: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    train = demo.train_clean
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "CERTIFIED_EPOCHS", 1)
    monkeypatch.setattr(demo, "IMAGES", 40)
    monkeypatch.setattr(demo, "train_clean", lambda model, loader, epochs, progress: train(
        model, loader, 1, progress))
    text = succeeds("demo", "-o", "out/demo", "--quiet")
    assert "2-bit dynamic + fine-tune" in text and "wrote out/demo/model.hardened.qg" in text
    assert "lower bounds" in text
    assert sorted(os.listdir("out/demo")) == ["model.certified.qg", "model.hardened.qg",
                                              "report.html", "report.json"]
    assert len(quantizers(qg.load("out/demo/model.hardened.qg"))) == 5


def test_a_run_dir_of_other_settings(model: str, data: str) -> None:
    arguments = ("harden", model, "--data", data, *HARDEN, "--run-dir", "run", "--force")
    succeeds(*arguments)
    assert "other settings" in fails(*arguments, "--seed", "1")
    evaluate = ("evaluate", model, "--data", data, *EVALUATE, "--run-dir", "e")
    succeeds(*evaluate)
    assert "other settings" in fails(*evaluate, "--eps", "0.2")


def test_ctrl_c_says_how_to_resume_and_exits_with_130(model: str, data: str,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    arguments = ("harden", model, "--data", data, *HARDEN, "--run-dir", "run")
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", interrupt)
        text = fails(*arguments, code=130)
        assert "saved in run" in text and "Run the same command again" in text
        text = fails("evaluate", model, "--data", data, *EVALUATE, code=130)
        assert "interrupted after 0 of" in text and "--run-dir" in text
    assert not Path("model.hardened.qg").exists()
    succeeds(*arguments)
    assert Path("model.hardened.qg").exists()
