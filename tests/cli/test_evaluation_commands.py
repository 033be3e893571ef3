"""quantguard evaluate and compare."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import EVALUATE, Digits, fails, run, succeeds

from quantguard.evaluation.comparison import Comparison
from quantguard.evaluation.results import Evaluation


def test_evaluate_writes_report_json_and_adversarials(converted: str, digits: Digits) -> None:
    text = succeeds("evaluate", converted, "--data", "digits", *EVALUATE, "--report", "r.html",
                    "--json", "r.json", "--adversarials", "a.npz", "--seed", "3")
    assert "Robust accuracy <=" in text and "12 images" in text
    read = Evaluation.from_dict(json.loads(Path("r.json").read_text()))
    assert read.images == 12 and read.seed == 3 and read.threat.eps == 0.1
    assert str(read) in text
    page = Path("r.html").read_text()
    assert page.startswith("<!doctype html>") and "converted.qg" in page
    with np.load("a.npz") as file:
        assert file["x"].shape == (12, 1, 8, 8)
        assert read.sample is not None and read.sample["of"] == 500
        drawn = digits[0][read.sample["indices"]].numpy()
        assert np.abs(file["x"] - drawn).max() <= 0.1 + 1e-6
        assert np.array_equal(file["broken"], read.correct & ~read.survived)


def test_evaluate_reads_the_training_split_and_statistics(model: str, data: str) -> None:
    text = succeeds("evaluate", model, "--data", data, *EVALUATE, "--split", "train", "--norm",
                    "l2", "--mean", "0", "--std", "1", "--device", "cpu", "--batch-size", "5")
    assert "L2, eps 0.1" in text


def test_compare_shows_a_row_for_each_model(model: str, converted: str) -> None:
    text = succeeds("compare", model, converted, "--data", "digits", *EVALUATE, "--json", "c.json",
                    "--report", "c.html", "--budget", "0.01s")
    rows = Comparison.from_dict(json.loads(Path("c.json").read_text())).rows
    assert list(rows) == [model, converted] and all(row.skipped for row in rows.values())
    assert "exact McNemar" in text and "wrote c.json" in text and "wrote c.html" in text
    assert Path("c.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("name", [pytest.param("report", marks=pytest.mark.slow), "report.htm"])
def test_report_is_a_page_whatever_its_suffix(name: str, model: str) -> None:
    succeeds("evaluate", model, "--data", "digits", *EVALUATE, "--report", name)
    assert Path(name).read_text().startswith("<!doctype html>")
    succeeds("compare", model, "--data", "digits", *EVALUATE, "--report", name)
    assert Path(name).read_text().startswith("<!doctype html>")


def test_strict_exits_with_1_unless_resolved(model: str) -> None:
    arguments = ("evaluate", model, "--data", "digits", *EVALUATE, "--strict", "--json", "r.json")
    result = run(*arguments)
    assert "Undecided" in result.output and result.exit_code == 1
    assert Path("r.json").exists() and "Traceback" not in result.output
    assert run("compare", *arguments[1:]).exit_code == 1
    nobody_left = run(*arguments, "--eps", "1")
    assert "0 of 12" in nobody_left.output and nobody_left.exit_code == 0


def test_a_name_for_adversarials_is_checked_before_any_work(model: str) -> None:
    text = fails("evaluate", model, "--data", "digits", *EVALUATE, "--adversarials", "a.png")
    assert ".npz" in text and "Robust accuracy" not in text


def test_a_model_named_twice(model: str) -> None:
    assert "named twice" in fails("compare", model, model, "--data", "digits")


def test_options_without_effect_are_refused(model: str) -> None:
    succeeds("evaluate", model, "--data", "digits", *EVALUATE, "--json", "a.json", "--quiet")
    text = fails("evaluate", model, "--data", "digits", "--replay", "a.json", "--seed", "4")
    assert "--seed has no effect here" in text and "a.json" in text
    Path("other.json").write_text("{}")
    assert "It has no 'format'" in fails("evaluate", model, "--data", "digits", "--replay",
                                         "other.json")
    succeeds("convert", model, "-o", "low.qg", "--quiet")
    assert "activations converted" in succeeds("inspect", "low.qg", "--trust")
    assert "low.qg is converted already" in fails("inspect", "low.qg", "--trust", "--bits", "4")
    assert "does not accept inputs" in fails("inspect", model, "--input-shape", "5,8,8")
