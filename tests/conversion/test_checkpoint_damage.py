"""Damaged .qg files raise errors, and no code of a file is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import sequential
from torch import nn

from quantguard.conversion import checkpoint
from quantguard.conversion.checkpoint import load, open_model, save
from quantguard.conversion.converter import convert
from quantguard.core.errors import LoadError
from quantguard.nn.quant_activation import quantizers


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "m.qg"
    save(convert(sequential(), 2), path)
    return path.read_bytes()


def changed(content: bytes, change: Callable[[dict[str, bytes]], Any]) -> bytes:
    """Return a zip file with changed members."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    change(members)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, member in members.items():
            file.writestr(name, member)
    return out.getvalue()


def without(name: str) -> Callable[[dict[str, bytes]], Any]:
    return lambda members: members.pop(name)


def replaced(name: str, member: bytes) -> Callable[[dict[str, bytes]], Any]:
    return lambda members: members.update({name: member})


def manifest(**values: Any) -> Callable[[dict[str, bytes]], Any]:
    """Return a function that changes fields of the manifest, or removes them."""
    def change(members: dict[str, bytes]) -> None:
        fields = json.loads(members["manifest.json"]) | values
        members["manifest.json"] = json.dumps(
            {k: v for k, v in fields.items() if v != "gone"}).encode()
    return change


def site(**values: Any) -> dict[str, Any]:
    return {"name": "2", "kind": "relu", "reason": "", "spec": {"bits": 2}} | values


@pytest.mark.parametrize("change", [
    without("manifest.json"), without("weights.safetensors"), without("skeleton.pt"),
    *(replaced("manifest.json", text) for text in (b"", b"{", b"[]", b"\xff\xfe\xff", b"7")),
    *(replaced("weights.safetensors", text) for text in (b"", b"x" * 40, b"\0" * 64)),
    *(replaced("skeleton.pt", text) for text in (b"", b"x" * 40, b"PK\x03\x04")),
    *(manifest(**{key: "gone"}) for key in ("format", "arch", "aliases", "sites", "audit")),
    *(manifest(format=value) for value in (0, 2, "1", [])),
    *(manifest(arch=value) for value in (3, ["torchvision:resnet18"], "torchvision:nonsense")),
    *(manifest(aliases=value) for value in ([1], 3, {"a": "b"}, {"0.weight": "4.weight"})),
    *(manifest(audit=value) for value in (5, {"ran": []}, [])),
    *(manifest(sites=value) for value in (5, [], [5], [{"name": "2"}], {"2": 1})),
    *(manifest(sites=[site(spec=spec), site(name="3.1", kind="gelu")]) for spec in (
        5, {"bits": 99}, {"bits": "2"}, {"bits": 2, "colour": 1}, {"bits": 3}, None)),
])
def test_a_damaged_file_is_a_load_error(change: Callable[[dict[str, bytes]], Any], content: bytes,
                                        tmp_path: Path) -> None:
    (tmp_path / "m.qg").write_bytes(changed(content, change))
    with pytest.raises(LoadError, match="m.qg|nonsense"):
        load(tmp_path / "m.qg")


@pytest.mark.parametrize("change", [lambda members: None, manifest(), manifest(sites=[
    site(), site(name="3.1", kind="gelu")])])
def test_unchanged_members_load(change: Callable[[dict[str, bytes]], Any], content: bytes,
                                tmp_path: Path) -> None:
    """Negative control of the test above: repacking alone does not damage a file."""
    (tmp_path / "m.qg").write_bytes(changed(content, change))
    assert len(quantizers(load(tmp_path / "m.qg"))) == 2


def test_a_cut_or_flipped_file_raises_an_error_or_loads_unchanged(content: bytes,
                                                                 tmp_path: Path) -> None:
    path = tmp_path / "m.qg"
    expected = _load_bytes(path, content).state_dict()
    damaged = [content[:size] for size in (0, 1, len(content) // 2, len(content) - 1)]
    for place in [*range(0, len(content), 53), *range(len(content) - 350, len(content))]:
        damaged.append(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1:])
    errors = 0
    for one in damaged:
        try:
            state = _load_bytes(path, one).state_dict()
        except LoadError:
            errors += 1
        else:
            assert all(torch.equal(v, expected[k]) for k, v in state.items())
    assert errors > len(damaged) / 2


def _load_bytes(path: Path, content: bytes) -> nn.Module:
    path.write_bytes(content)
    return load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save(sequential(), tmp_path / "m.pt")
    (tmp_path / "empty").touch()
    with pytest.raises(LoadError, match="absent does not exist"):
        load(tmp_path / "absent")
    for path in (tmp_path, tmp_path / "m.pt", tmp_path / "empty"):
        with pytest.raises(LoadError, match="is not a .qg file"):
            load(path)


class Runs:
    """Object whose pickle is a function call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def hidden_in_a_module(attack: Runs) -> nn.Module:
    model = sequential()
    model.__dict__["note"] = attack
    return model


@pytest.mark.parametrize("wrap", [
    lambda attack: attack, lambda attack: {"model": attack}, hidden_in_a_module])
@pytest.mark.parametrize("function", ["system", "exec", "mkdir"])
@pytest.mark.parametrize("pass_model", [False, True])
def test_code_in_a_skeleton_is_not_run(function: str, wrap: Callable[[Runs], Any], pass_model: bool,
                                       content: bytes, tmp_path: Path) -> None:
    mark = tmp_path / "run"
    attack = {"system": Runs(os.system, f"mkdir {mark}"), "mkdir": Runs(os.mkdir, str(mark)),
              "exec": Runs(exec, f"import os; os.mkdir({str(mark)!r})")}[function]
    file = io.BytesIO()
    torch.save(wrap(attack), file)
    (tmp_path / "m.qg").write_bytes(changed(content, replaced("skeleton.pt", file.getvalue())))
    if pass_model:  # the skeleton is not read at all
        assert len(quantizers(load(tmp_path / "m.qg", model=sequential()))) == 2
    else:
        with pytest.raises(LoadError, match="Nothing was run"):
            load(tmp_path / "m.qg")
        with pytest.raises(LoadError, match="Nothing was run"):
            open_model(str(tmp_path / "m.qg"))
    assert not mark.exists()
    # Negative control: torch's own reader does run it.
    torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert mark.exists()


def test_a_plain_pickle_as_skeleton_is_not_run(content: bytes, tmp_path: Path) -> None:
    mark = tmp_path / "run"
    for protocol in (0, 2, 4):
        evil = pickle.dumps(Runs(os.mkdir, str(mark)), protocol)
        (tmp_path / "m.qg").write_bytes(changed(content, replaced("skeleton.pt", evil)))
        with pytest.raises(LoadError):
            load(tmp_path / "m.qg")
    assert not mark.exists()


def test_a_skeleton_that_is_not_a_model_is_refused(content: bytes, tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, file)
    (tmp_path / "m.qg").write_bytes(changed(content, replaced("skeleton.pt", file.getvalue())))
    with pytest.raises(LoadError):
        load(tmp_path / "m.qg")


def test_the_file_format(content: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        fields = json.loads(file.read("manifest.json"))
        assert sorted(file.namelist()) == ["manifest.json", "skeleton.pt", "weights.safetensors"]
    assert fields["format"] == checkpoint.FORMAT == 1
    assert fields["class"] == "torch.nn.modules.container.Sequential"
    assert [row["name"] for row in fields["sites"]] == ["2", "3.1"]
    assert fields["sites"][0]["spec"] == {"bits": 2, "dynamic": False, "per_channel": False,
                                        "form": "uniform", "range_factor": 1.0}
