"""Output files are checked before any work, and none is lost."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import EVALUATE, HARDEN, fails, run, succeeds
from torch import nn

import quantguard as qg
from quantguard.attacks import PGD
from quantguard.cli import arguments as cli_arguments
from quantguard.cli import output as cli_output
from quantguard.conversion import checkpoint
from quantguard.core.errors import WriteError
from quantguard.data.loader import load_data
from quantguard.evaluation.comparison import Comparison
from quantguard.evaluation.results import Evaluation
from quantguard.nn.quant_activation import quantizers
from quantguard.training import ablation


@pytest.mark.parametrize("verb", ["convert", "harden"])
def test_an_existing_output_is_refused_before_any_work(verb: str, model: str, data: str,
                                                       here: Path) -> None:
    output = here / {"convert": "model.qg", "harden": "model.hardened.qg"}[verb]
    output.write_text("mine")
    arguments = [verb, model, *(("--data", data, *HARDEN) if verb == "harden" else ())]
    assert "--force" in fails(*arguments)
    assert output.read_text() == "mine"
    succeeds(*arguments, "--force")
    assert quantizers(qg.load(output))


def test_a_missing_output_folder_is_refused_before_any_work(model: str, data: str) -> None:
    for arguments in (("convert", model, "-o", "no/m.qg"),
                      ("harden", model, "--data", data, "-o", "no/m.qg"),
                      ("evaluate", model, "--data", data, "--report", "no/r.html"),
                      ("evaluate", model, "--data", data, "--json", "no/r.json"),
                      ("evaluate", model, "--data", data, "--adversarials", "no/a.npz"),
                      ("compare", model, "--data", data, "--json", "no/r.json"),
                      ("inspect", model, "--json", "no/r.json")):
        assert "does not exist" in fails(*arguments)


@pytest.mark.parametrize(("verb", "option", "name"), [
    ("convert", "-o", "x.qg"), ("harden", "-o", "x.qg"), ("harden", "--run-dir", "run/one"),
    ("evaluate", "--report", "r.html"), ("evaluate", "--json", "r.json"),
    ("evaluate", "--adversarials", "a.npz"), ("evaluate", "--run-dir", "run"),
    ("certify", "--json", "r.json"), ("certify", "--run-dir", "run"),
    ("compare", "--json", "r.json"), ("compare", "--run-dir", "run"), ("ablate", "-o", "x.qg"),
    ("ablate", "--report", "r.html"), ("ablate", "--run-dir", "run"), ("inspect", "--json", "r"),
    ("sensitivity", "--json", "r.json"), ("sensitivity", "--run-dir", "run")])
def test_unwritable_output_is_refused_before_any_work(verb: str, option: str, name: str,
                                                        model: str, data: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_arguments, "load_model", None)
    more = () if verb in ("convert", "inspect") else ("--data", data)
    text = fails(verb, model, *more, option, f"/proc/{name}")
    assert text.startswith(f"Error: /proc/{name} cannot be written\n")


def test_write_checks_leave_no_file_and_refuse_devices(model: str, here: Path) -> None:
    cli_arguments.check_folder("run/one")
    cli_arguments.check_writable("r.json")
    assert os.listdir(here) == [model]
    assert "/dev/null is not a file" in fails("inspect", model, "--json", "/dev/null")


def test_a_failed_write_prevents_neither_the_table_nor_other_files(
        model: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = qg.evaluate(torch.load(model, weights_only=False), load_data("digits", "test"),
                      suite=[PGD("ce", 1)], images=10, progress=False)
    made = Comparison({"float": row}, models={"float": nn.Sequential(nn.Flatten())})
    monkeypatch.setattr(ablation, "ablate", lambda *args, **options: made)

    def fail(*_: Any, **options: Any) -> None:
        raise WriteError("full")

    arguments = ("ablate", model, "--data", data, "-o", "x.qg", "--json", "a.json", "--augment")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", fail)
        text = fails(*arguments)
        assert "float" in text and "Error: full" in text and Path("a.json").exists()
        assert not Path("x.qg").exists()
    written = json.loads(Path("a.json").read_text())["settings"]
    assert written == {"model": model, "arch": None, "data": data, "augment": True, "size": None}
    monkeypatch.setattr(cli_output, "write_text", fail)
    text = fails(*arguments)
    assert "float" in text and "Error: full" in text and Path("x.qg").exists()


@pytest.mark.parametrize("arguments", [
    ("evaluate", "model.pt", "--data", "digits", "--json", "model.pt"),
    ("evaluate", "model.pt", "--data", "digits", "--report", "./model.pt"),
    ("evaluate", "model.pt", "--data", "digits", "--json", "one.x", "--report", "one.x"),
    ("certify", "model.pt", "--data", "digits", "--json", "model.pt"),
    ("inspect", "model.pt", "--json", "model.pt"),
    ("sensitivity", "model.pt", "--data", "digits", "--json", "model.pt"),
    ("compare", "model.pt", "other.pt", "--data", "digits", "--report", "other.pt"),
    ("evaluate", "model.pt", "--data", "npz:d.npz", "--adversarials", "d.npz"),
    ("ablate", "model.pt", "--data", "digits", "--json", "a.qg", "-o", "a.qg")])
def test_outputs_overwrite_neither_inputs_nor_each_other(arguments: Any, model: str,
                                                             here: Path) -> None:
    (here / "other.pt").write_bytes((here / model).read_bytes())
    (here / "d.npz").write_bytes(b"data")
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    text = fails(*arguments)
    assert "would be written over an input file" in text or "name the same file" in text
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


def test_files_are_written_before_the_table_is_printed(
        model: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any, **options: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    monkeypatch.setattr(cli_output.click, "echo",
                        lambda *a, **o: None if o.get("err") else closed())
    result = run("evaluate", model, "--data", data, *EVALUATE, "--json", "a.json", "--report",
                 "a.html", "--adversarials", "a.npz")
    assert result.exit_code == 1
    assert Evaluation.load("a.json").images == 12
    assert all(Path(name).stat().st_size > 1000 for name in ("a.html", "a.npz"))


def test_written_files_and_a_lack_of_images_are_reported(model: str,
                                                                       data: str) -> None:
    text = succeeds("evaluate", model, "--data", data, "--suite", "quick", "--images", "61",
                    "--eps", "0.1", "--json", "a.json", "--report", "a.html")
    assert "wrote a.json" in text and "wrote a.html" in text
    assert "note: --images 61, and npz:small.npz has 60" in text
