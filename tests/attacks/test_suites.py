"""Suites: their entries, settings, budgets and groups."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from torch import nn

from quantguard.attacks import PGD, Entry, Noise, build_suite
from quantguard.attacks.base import fb
from quantguard.core.errors import SpecError
from quantguard.core.specs import Threat

Untouched = Callable[[nn.Module], AbstractContextManager[None]]



@pytest.mark.parametrize(("suite", "message"), [
    ("standart", "did you mean 'standard'"), ("", "Use one of quick, standard"),
    ([], "contains no attack"), ([PGD(), "quick"], "attack 2 of the suite is a str"),
    ([PGD], "attack 1 of the suite is a")])
def test_invalid_suites_name_valid_ones(suite: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build_suite(suite, Threat(), seed=0, quantized=True)


@pytest.mark.parametrize("suite", [
    "quick", "standard", "paper", "full",
    [PGD("ce", 3, sharpness=(2, 4)), Noise(), fb.attacks.L2DeepFoolAttack(),
     fb.attacks.BoundaryAttack()]], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("quantized", [True, False])
def test_settings_of_every_entry_are_json(suite: Any, norm: str, quantized: bool) -> None:
    entries = build_suite(suite, Threat(norm), seed=5, quantized=quantized, saturated=True).every
    settings = [entry.settings() for entry in entries]
    assert json.loads(json.dumps(settings)) == settings
    assert len({s["label"] for s in settings}) == len(entries)
    assert all(entry.cost >= 1 for entry in entries)
    # the JSON has results of the attack under these keys, next to its settings
    done = {"queries", "gradients", "seconds", "own_success", "median_norm", "attacked_images",
            "broke_images"}
    assert not any(done & set(s) for s in settings)
    assert not [s for s in settings if " at 0x" in json.dumps(s)]


@pytest.mark.parametrize("suite", ["quick", "standard", "full"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_float_model_gets_the_same_budget_as_a_quantized_one(suite: str, norm: str) -> None:
    float_row, quantized_row = (build_suite(suite, Threat(norm), seed=0, quantized=q)
                                for q in (False, True))
    assert sum(e.cost for e in float_row.every) == sum(e.cost for e in quantized_row.every)
    for entry in float_row.every + quantized_row.every:
        if isinstance(entry.attack, PGD | Noise):
            assert entry.attack.norm == norm
    assert {e.group for e in quantized_row.entries} - {"cw", "other"} == {
        "noise", "fgsm", "pgd", "modes", "softened"}
    assert not {e.group for e in quantized_row.entries} & {"transfer", "black-box", "escalation"}
    assert {e.group for e in quantized_row.reseeded} == {"reseeded"}
    assert {e.group for e in quantized_row.gradient_free} - {"black-box"} == {"transfer"}
    trained = {"transfer"} if suite == "full" else set()  # a substitute, on any model
    assert {e.group for e in float_row.gradient_free} - {"black-box"} == trained
    assert {e.group for e in quantized_row.rounds} == {"escalation"}


def test_a_list_may_contain_entries_with_their_own_labels() -> None:
    mine = Entry("mine", PGD("ce", 2), "pgd", everywhere=True)
    suite = build_suite([mine, PGD("ce", 2)], Threat(), seed=0, quantized=False)
    entries = suite.entries
    assert not suite.rounds and not suite.gradient_free
    assert entries[0] is mine and entries[1].group == "pgd" and entries[1].everywhere


@pytest.mark.parametrize(
    ("attack", "group"),
    [
        (PGD("ce", 2), "pgd"),
        (PGD("ce", 2, sharpness=(2, 16)), "softened"),
        (PGD(bits=32), "transfer"),
        (Noise(), "noise"),
        (fb.attacks.LinfPGD(), "pgd"),
        (fb.attacks.FGSM(), "fgsm"),
        (fb.attacks.L2CarliniWagnerAttack(), "cw"),
        (fb.attacks.BoundaryAttack(), "other"),
    ],
)
def test_attacks_in_a_list_get_their_group(attack: Any, group: str) -> None:
    assert build_suite([attack], Threat(), seed=0, quantized=True).entries[0].group == group
