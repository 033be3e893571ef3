"""Results of evaluations as JSON and as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_suites import Digits

from quantguard.core.errors import DataError
from quantguard.evaluation.results import Evaluation

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"


def test_json_round_trip(result: Evaluation, tmp_path: Path) -> None:
    data = json.loads(json.dumps(result.to_dict()))
    read = Evaluation.from_dict(data)
    assert json.loads(json.dumps(read.to_dict())) == data and str(read) == str(result)
    assert np.array_equal(read.survived, result.survived) and read.verdict == result.verdict
    assert read.threat == result.threat and read.flags == result.flags
    result.save(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == data
    assert data["images"] == 100 and data["survived"] == int(result.survived.sum())
    with pytest.raises(DataError, match="read from JSON"):
        read.save_adversarials(tmp_path / "a.npz")


def test_results_can_be_compared(result: Evaluation) -> None:
    read = Evaluation.from_dict(result.to_dict())
    assert (read == result) in (True, False)
    assert result == result and read.attacks[0] != 3


@pytest.mark.parametrize("change", [{"format": 99}, {"images": None}, {"flags": [{"a": 1}]}])
def test_other_json_is_an_error(change: dict[str, Any], result: Evaluation) -> None:
    with pytest.raises(DataError, match="evaluation JSON"):
        Evaluation.from_dict({**result.to_dict(), **change})
    with pytest.raises(DataError, match="no evaluation JSON"):
        Evaluation.from_dict({})


def test_adversarials_are_saved_with_labels(result: Evaluation, tmp_path: Path,
                                            digits: Digits) -> None:
    result.save_adversarials(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["x"], result.adversarials)
        assert np.array_equal(file["y"], digits[1][:100].numpy())
        assert np.array_equal(file["broken"], result.correct & ~result.survived)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    with pytest.raises(DataError, match=r"\.npz"):
        result.save_adversarials(tmp_path / "a.zip")


def test_json_of_the_first_format_is_read_in_todays_names() -> None:
    files = sorted((RESULTS / "fashion_lenet").glob("*.json"))
    rows = [json.loads(file.read_text())["evaluation"] for file in files]
    assert rows and all(row["format"] == 1 for row in rows)
    groups = {attack["group"] for row in rows for attack in row["attacks"]}
    assert "twin" in groups
    for row in rows:
        result = Evaluation.from_dict(row)
        assert result.robust_accuracy == row["robust_accuracy"]
        assert "twin" not in json.dumps(result.to_dict()).replace("twin_", "")
        assert Evaluation.from_dict(result.to_dict()).to_dict() == result.to_dict()
