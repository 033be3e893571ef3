"""quantguard inspect and convert."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from command_line import Digits, fails, succeeds
from torch import nn

import quantguard as qg
from quantguard.nn.quant_activation import quantizers


def test_inspect_shows_every_activation(model: str) -> None:
    text = succeeds("inspect", model, "--bits", "3", "--dynamic", "--input-bits", "8",
                    "--input-range", "0,1", "--json", "plan.json")
    written = json.loads(Path("plan.json").read_text())
    rows = written["sites"]
    assert written["input"] == {"bits": 8, "low": [0.0], "high": [1.0]} and written["unread"] == {}
    assert [row["name"] for row in rows] == ["2", "5", "9", "12"]
    assert all(re.search(rf"^{row['name']} ", text, re.MULTILINE) for row in rows)
    assert "17" in succeeds("inspect", "torchvision:resnet18")
    assert sorted(os.listdir()) == ["model.pt", "plan.json"]


def test_convert_prints_a_count_and_writes_a_loadable_file(model: str, digits: Digits,
                                                          cnn: nn.Module) -> None:
    text = succeeds("convert", model, "--bits", "3")
    assert "4 of 4 activations converted" in text and "wrote model.qg" in text
    loaded = qg.load("model.qg")
    assert {(m.spec.bits, m.spec.dynamic) for m in quantizers(loaded).values()} == {(3, False)}
    with qg.bypass(loaded), torch.no_grad():
        assert torch.equal(loaded(digits[0][:9]), cnn(digits[0][:9]))
    succeeds("convert", model, "--data", "digits", "--dynamic", "-o", "other.qg", "--quiet")
    assert {m.spec.dynamic for m in quantizers(qg.load("other.qg")).values()} == {True}


def test_bits_of_single_sites(model: str) -> None:
    text = succeeds("inspect", model, "--bits", 4, "--bits", "first=8", "--bits", "last=1")
    found = re.findall(r"(\d)-bit", text)
    assert found[0] == "8" and found[-1] == "1" and set(found[1:-1]) <= {"4"}
    assert "neither a number of bits nor PATTERN=BITS" in fails("inspect", model, "--bits", "two",
                                                                code=2)
    assert "matches no activation site" in fails("convert", model, "--bits", "nothing=3")


def test_convert_of_a_resnet18_file_converts_17_of_17(here: Path) -> None:
    torch.save(torchvision.models.resnet18(), here / "model.pt")
    text = succeeds("convert", "model.pt", "--bits", "2", "--dynamic")
    assert "17 of 17 activations converted" in text
    loaded = qg.load("model.qg")
    assert type(loaded) is not nn.Sequential and isinstance(loaded, torchvision.models.ResNet)
    assert len(quantizers(loaded)) == 17


OWN = """
from torch import nn
class Net(nn.Sequential):
    pass
def make():
    return Net(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
"""


def test_a_note_says_that_a_users_class_needs_its_code(
        here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "ownnet.py").write_text(OWN)
    monkeypatch.syspath_prepend(here)
    text = succeeds("convert", "ownnet:make", "-o", "own.qg")
    assert "note: own.qg contains a Net" in text and "--arch ownnet:make" in text
    monkeypatch.delitem(sys.modules, "ownnet")  # a command starts without the module
    assert "--arch ownnet:make" in fails("inspect", "own.qg")
    assert "converted" in succeeds("inspect", "own.qg", "--trust")
    assert "converted" in succeeds("inspect", "own.qg", "--arch", "ownnet:make")
    assert "note:" not in succeeds("convert", "torchvision:resnet18", "-o", "r.qg")


def test_models_without_activations_and_converted_models_are_refused(here: Path,
                                                                     converted: str) -> None:
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "linear.pt")
    assert "no activations to convert" in fails("convert", "linear.pt")
    assert "no activations to convert" in fails("inspect", "linear.pt")
    assert "converted already" in fails("convert", converted, "-o", "twice.qg")
    assert not Path("twice.qg").exists()
    assert "this one is converted" in fails("ablate", converted, "--data", "digits")


def test_patterns_without_a_match_and_impossible_bits(model: str) -> None:
    assert "nothing-like-it" in fails("convert", model, "--exclude", "nothing-like-it")
    assert "bits=9" in fails("convert", model, "--bits", "9")


def test_a_malformed_shape(model: str) -> None:
    assert "write 3,224,224" in fails("convert", model, "--input-shape", "1,0,8", code=2)
    succeeds("convert", model, "--input-shape", "1x8x8")
