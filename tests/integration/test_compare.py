"""compare: rows on the same images, JSON, resuming."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fine_tuning import THREAT, Digits
from hardened_models import SUITE
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.attacks import PGD
from quantguard.core.errors import DataError, SpecError
from quantguard.evaluation import suite_runner
from quantguard.evaluation.comparison import Comparison


def compared(models: dict[str, nn.Module], loader: Any, **options: Any) -> Comparison:
    return qg.compare(models, loader, THREAT, **{"suite": SUITE, "progress": False, **options})


@pytest.fixture(scope="module")
def comparison(cnn: nn.Module, quantized: nn.Module, test_loader: DataLoader[Any]) -> Comparison:
    return compared({"float": cnn, "2 <bit>": quantized}, test_loader)


def test_compare_evaluates_every_row_on_the_same_images(comparison: Comparison, cnn: nn.Module,
                                                        quantized: nn.Module,
                                                        test_loader: DataLoader[Any]) -> None:
    assert list(comparison.rows) == ["float", "2 <bit>"]
    one, two = comparison.rows.values()
    assert one.image_hash == two.image_hash and one.images == two.images == 60
    one_suite, two_suite = (
        [a.settings for a in row.attacks if a.settings["class"] != "transferred"]
        for row in (one, two)
    )
    assert one_suite == two_suite
    alone = qg.evaluate(quantized, test_loader, THREAT, suite=SUITE, progress=False)
    transferred = (
        two.attacks[-1].broken
        if two.attacks[-1].settings["class"] == "transferred"
        else np.zeros(60, dtype=bool)
    )
    assert np.array_equal(alone.adversarials[~transferred], two.adversarials[~transferred])
    assert np.array_equal(alone.survived & ~transferred, two.survived)
    assert comparison.models == {"float": cnn, "2 <bit>": quantized}
    only, other, p = comparison.paired("float", "2 <bit>")
    assert only == (one.survived & ~two.survived).sum() and 0 <= p <= 1
    assert other == (two.survived & ~one.survived).sum()


def test_compare_notes_a_missing_float_control(quantized: nn.Module, cnn: nn.Module,
                                                     comparison: Comparison,
                                                     test_loader: DataLoader[Any]) -> None:
    assert comparison.notes == ()
    alone = compared({"a": quantized}, test_loader, images=5)
    assert alone.notes == ("no float control among the rows",)
    assert "Note: no float control" in str(alone) and "no float control" in alone._repr_html_()
    assert compared({"a": cnn}, test_loader, images=5).notes == ()
    with pytest.raises(SpecError, match="no models"):
        compared({}, test_loader)
    with pytest.raises(SpecError, match="no time"):
        compared({"a": cnn}, test_loader, budget="soon")


def test_comparison_json_round_trip_and_save(comparison: Comparison, tmp_path: Path) -> None:
    written = json.loads(json.dumps(comparison.to_dict()))
    read = Comparison.from_dict(written)
    assert json.loads(json.dumps(read.to_dict())) == written and str(read) == str(comparison)
    assert read.paired("float", "2 <bit>") == comparison.paired("float", "2 <bit>")
    comparison.save(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text()) == written
    comparison.save(str(tmp_path / "c.html"))
    assert (tmp_path / "c.html").read_text().startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.html", "c.json"]
    for damaged in ({}, {"rows": {}}, {**written, "rows": {"a": {}}}):
        with pytest.raises(DataError, match="JSON"):
            Comparison.from_dict(damaged)


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["global", "own"])
def test_a_loader_that_shuffles_does_not_make_rows_of_different_images(
        generator: torch.Generator | None, cnn: nn.Module, digits: Digits) -> None:
    loader = DataLoader(TensorDataset(*digits), batch_size=10, shuffle=True, generator=generator)
    hashes: set[str] = set()
    with suppress(DataError):  # to refuse such a loader is right, too
        rows = compared({"a": cnn, "b": cnn}, loader, images=10, suite=[PGD("ce", 1)]).rows
        hashes = {row.image_hash for row in rows.values()}
    assert len(hashes) <= 1


@pytest.mark.slow
def test_compare_resumes_each_row_in_its_own_folder(
        cnn: nn.Module, quantized: nn.Module, comparison: Comparison,
        test_loader: DataLoader[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"float": cnn, "2 <bit>": quantized}
    compared(models, test_loader, run_dir=tmp_path)
    monkeypatch.setattr(suite_runner, "run_attack", None)
    again = compared(models, test_loader, run_dir=tmp_path)
    for name, row in again.rows.items():
        assert np.array_equal(row.survived, comparison.rows[name].survived)


def test_attacks_may_come_from_a_generator(cnn: nn.Module, test_loader: DataLoader[Any]) -> None:
    made = qg.compare({"a": cnn, "b": cnn}, test_loader, THREAT, images=10, progress=False,
                      suite=(PGD("ce", steps) for steps in (1, 2)))  # type: ignore[arg-type]
    assert [len(row.attacks) >= 2 for row in made.rows.values()] == [True, True]


def test_comparing_leaves_the_callers_random_numbers(cnn: nn.Module, digits: Digits) -> None:
    before = torch.get_rng_state()
    shuffling = DataLoader(TensorDataset(*digits), batch_size=50, shuffle=True)
    qg.compare({"a": cnn}, shuffling, THREAT, suite=[PGD("ce", 1)], images=10, progress=False)
    assert torch.equal(before, torch.get_rng_state())
