"""Hardening in stages of decreasing bits, and bits by site."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fine_tuning import inner
from hardening_stages import FAST, staged
from torch import nn
from torch.utils.data import DataLoader

import quantguard as qg
from quantguard.core.errors import SpecError
from quantguard.nn.quant_activation import quantizers
from quantguard.training import stage_trainer
from quantguard.training.bit_schedule import stages
from quantguard.training.recipes import Recipe


@pytest.mark.parametrize(("bit_schedule", "bits", "epochs", "expected"), [
    ((32,), 2, 1, [(2, 1)]), ((32,), 2, 2, [(32, 1), (2, 1)]), ((32,), 2, 3, [(32, 1), (2, 2)]),
    ((32,), 2, 6, [(32, 3), (2, 3)]), ((32,), 32, 6, [(32, 6)]), ((), 2, 6, [(2, 6)]),
    ((32, 8, 4), 2, 12, [(32, 2), (8, 2), (4, 2), (2, 6)]),
    ((32, 8, 4), 2, 4, [(8, 1), (4, 1), (2, 2)]), ((32, 8, 4), 4, 4, [(32, 1), (8, 1), (4, 2)])])
def test_stages_share_the_epochs_and_the_last_has_half(bit_schedule: tuple[int, ...], bits: int,
                                                       epochs: int, expected: Any) -> None:
    assert stages(Recipe("pgd", bit_schedule=bit_schedule), bits, epochs) == expected


def test_a_quantized_row_starts_from_the_float_stage(cnn: nn.Module, loader: DataLoader[Any],
                                                     tmp_path: Path) -> None:
    before = copy.deepcopy(cnn.state_dict())
    recipe = Recipe("pgd", steps=2, lr=1e-3, bit_schedule=(32,))
    made = staged(cnn, loader, run_dir=tmp_path, recipe=recipe)
    assert [(s.name, s.epochs) for s in made.stages] == [("float", 1), ("2 bits", 1)]
    assert {m.spec.bits for m in inner(made.model).values()} == {2}
    assert all(torch.equal(v, before[k]) for k, v in cnn.state_dict().items())
    rows = json.loads((tmp_path / "stages.json").read_text())
    assert [row["bits"] for row in rows] == [32, 2] and rows[0]["history_epochs"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1-float", "2-2-bits", "stages.json"]
    # the second stage starts from the weights of the float stage
    alone = staged(cnn, loader, recipe=Recipe("pgd", steps=2, lr=1e-3, bit_schedule=()), epochs=1)
    assert alone.stages[0].history.epochs[0] != made.stages[1].history.epochs[0]
    # the same call again reads the run directory
    again = staged(cnn, loader, run_dir=tmp_path, recipe=recipe)
    assert all(torch.equal(v, again.model.state_dict()[k])
               for k, v in made.model.state_dict().items())


@pytest.mark.slow
def test_converted_models_and_thresholds_alone_have_one_stage(
        cnn: nn.Module, quantized: nn.Module, loader: DataLoader[Any]) -> None:
    assert len(staged(quantized, loader, bits=None, dynamic=None).stages) == 1
    recipe = dataclasses.replace(FAST, lr=None)
    assert len(staged(cnn, loader, recipe=recipe, train="thresholds").stages) == 1


def test_bits_by_site(cnn: nn.Module, loader: DataLoader[Any]) -> None:
    table = {"*": 2, "first": 4}
    made = staged(cnn, loader, bits=table, epochs=1)
    assert [m.spec.bits for m in inner(made.model).values()] == [4, 2, 2, 2]
    # the stages before are those of the lowest bits
    made = staged(
        cnn, loader, bits=table, recipe=Recipe("clean", lr=1e-3, bit_schedule=(4, 3)), epochs=4
    )
    assert [s.bits for s in made.stages] == [4, 3, 2]
    assert [m.spec.bits for m in inner(made.model).values()] == [4, 2, 2, 2]
    assert [s.name for s in made.stages] == ["4 bits", "3 bits", "* 2, first 4"]
    with pytest.raises(SpecError, match="this one is converted"):
        staged(made.model, loader, bits=table)
    one = staged(cnn, loader, bits={"*": 32}, dynamic=None, recipe=Recipe("clean", lr=1e-3))
    assert not quantizers(one.model)


@pytest.mark.parametrize("bits", [{"*": 2, "no such site": 4}, {"*": 2, "first": 9},
                                  {"*": "2", "first": 4}])
def test_wrong_bits_by_site_are_refused_before_any_work(
        bits: Any, cnn: nn.Module, loader: DataLoader[Any],
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_trainer, "fit", lambda *_, **__: pytest.fail("it has trained"))
    with pytest.raises(SpecError, match=r"no such site|9|must give each pattern"):
        staged(cnn, loader, bits=bits, recipe=Recipe("pgd", bit_schedule=(32,)))


def test_a_stage_of_a_converted_model_has_its_bits(cnn: nn.Module,
                                                   loader: DataLoader[Any]) -> None:
    made = staged(qg.convert(cnn, bits=4), loader, bits=None, dynamic=None, epochs=1,
                  recipe=Recipe("nfgsm", lr=1e-3))
    assert [(stage.name, stage.bits) for stage in made.stages] == [("4 bits", 4)]
