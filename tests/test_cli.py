"""The command line: every verb on digits, and one clear line for every wrong input."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner, Result
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import quantguard as qg
from quantguard import checkpoint, cli, demo, given, pipeline, progress
from quantguard.activation import staircases
from quantguard.attacks import PGD, suites
from quantguard.cli import main
from quantguard.data import load_data
from quantguard.errors import WriteError
from quantguard.pipeline import Comparison
from quantguard.progress import Progress
from quantguard.results import Evaluation

Digits = tuple[Tensor, Tensor]
EVALUATE = ("--suite", "quick", "--images", "12", "--eps", "0.1")
HARDEN = ("--eps", "0.1", "--epochs", "1", "--set", "steps=1", "--set", "lr=1e-3")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def succeeds(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output or repr(result.exception)
    return result.output


def fails(*arguments: Any, code: int = 1) -> str:
    """Run what must end in one clear error, and in nothing else."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code
    assert re.search(r"^Error: \S", result.output, re.MULTILINE), result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture(autouse=True)
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``quick`` be quicker: every kind of attack, a few steps each."""
    monkeypatch.setitem(suites._SUITES, "quick", (3, 3, 16))
    monkeypatch.setattr(suites, "MODES", ("sigmoid(8)",))
    monkeypatch.setattr(suites, "TWINS", suites.TWINS[:1])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(here: Path, cnn: nn.Module) -> str:
    """The small CNN as ``torch.save`` writes it: model.pt."""
    torch.save(cnn, here / "model.pt")
    return "model.pt"


@pytest.fixture
def converted(here: Path, quantized: nn.Module) -> str:
    qg.save(quantized, here / "converted.qg")
    return "converted.qg"


@pytest.fixture
def data(here: Path, train_digits: TensorDataset, digits: Digits) -> str:
    """400 training and 60 test images as an npz file."""
    x, y = (t.numpy() for t in train_digits.tensors)
    write_npz(here / "small.npz", x[:400], y[:400], digits[0][:60].numpy(), digits[1][:60].numpy())
    return "npz:small.npz"


def write_npz(path: Path, x: Any, y: Any, x_test: Any = None, y_test: Any = None) -> str:
    np.savez(path, x_train=x, y_train=y, x_test=x if x_test is None else x_test,
             y_test=y if y_test is None else y_test)
    return f"npz:{path}"


# --- happy paths ---


def test_inspect_shows_every_activation(model: str) -> None:
    text = succeeds("inspect", model, "--bits", "3", "--dynamic", "--input-bits", "8",
                    "--input-range", "0,1", "--json", "plan.json")
    told = json.loads(Path("plan.json").read_text())
    rows = told["sites"]
    assert told["input"] == {"bits": 8, "low": [0.0], "high": [1.0]} and told["unread"] == {}
    assert [row["name"] for row in rows] == ["2", "5", "9", "12"]
    assert all(re.search(rf"^{row['name']} ", text, re.MULTILINE) for row in rows)
    assert "17" in succeeds("inspect", "torchvision:resnet18")
    assert sorted(os.listdir()) == ["model.pt", "plan.json"]


def test_convert_says_how_many_and_writes_what_load_reads(model: str, digits: Digits,
                                                          cnn: nn.Module) -> None:
    text = succeeds("convert", model, "--bits", "3")
    assert "4 of 4 activations converted" in text and "wrote model.qg" in text
    loaded = qg.load("model.qg")
    assert {(m.spec.bits, m.spec.dynamic) for m in staircases(loaded).values()} == {(3, False)}
    with qg.bypass(loaded), torch.no_grad():
        assert torch.equal(loaded(digits[0][:9]), cnn(digits[0][:9]))
    succeeds("convert", model, "--data", "digits", "--dynamic", "-o", "other.qg", "--quiet")
    assert {m.spec.dynamic for m in staircases(qg.load("other.qg")).values()} == {True}


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
    assert len(staircases(loaded)) == 17


def test_harden_converts_trains_and_writes(model: str, data: str) -> None:
    text = succeeds("harden", model, "--data", data, *HARDEN, "--dynamic", "--run-dir",
                    "run")
    assert "wrote model.hardened.qg" in text
    loaded = qg.load("model.hardened.qg")
    assert {(name == "input_staircase.staircase", m.spec.bits, m.spec.dynamic)
            for name, m in staircases(loaded).items()} == {(True, 8, False), (False, 2, True)}
    assert sorted(os.listdir("run")) == [".lock", "metrics.jsonl", "run.json", "training.pt"]
    again = "harden", "model.hardened.qg", "--data", data, "--train", "thresholds", "-o", \
        "again.qg", "--recipe", "nfgsm", "--augment", "--epochs", "1", "--eps", "0.1"
    assert "has no lr: weights are not trained" in fails(*again, "--set", "lr=1e-3")
    succeeds(*again)
    control = "harden", model, "--data", data, *HARDEN, "--bits", "32", "-o", "control.qg"
    assert "a staircase of 8 bits stands on the input" in succeeds(*control)
    assert list(staircases(qg.load("control.qg"))) == ["input_staircase.staircase"]
    succeeds(*control, "--set", "input_bits=0", "--force")
    assert not staircases(qg.load("control.qg"))
    succeeds("harden", model, "--data", data, *HARDEN, "--bits", "first=4", "-o", "mixed.qg",
             "--set", "input_bits=0")
    assert [m.spec.bits for m in staircases(qg.load("mixed.qg")).values()] == [4, 2, 2, 2]
    # the last that matches counts, also where a pattern was there before
    succeeds("convert", model, "--bits", "first=4", "--bits", "3", "-o", "last.qg")
    assert {m.spec.bits for m in staircases(qg.load("last.qg")).values()} == {3}


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


def test_compare_shows_a_row_a_model(model: str, converted: str) -> None:
    text = succeeds("compare", model, converted, "--data", "digits", *EVALUATE, "--json", "c.json",
                    "--report", "c.html", "--budget", "0.01s")
    rows = Comparison.from_dict(json.loads(Path("c.json").read_text())).rows
    assert list(rows) == [model, converted] and all(row.skipped for row in rows.values())
    assert "exact McNemar" in text and "wrote c.json" in text and "wrote c.html" in text
    assert Path("c.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_ablate_shows_four_rows_and_writes_the_hardened_model(model: str, data: str) -> None:
    text = succeeds("ablate", model, "--data", data, *HARDEN, "--dynamic", "--suite", "quick",
                    "--images", "8", "-o", "out.qg", "--json", "a.json", "--run-dir", "run")
    told = json.loads(Path("a.json").read_text())
    assert list(told["rows"]) == ["float", "float + fine-tune", "2-bit dynamic",
                                  "2-bit dynamic + fine-tune"]
    assert "2-bit dynamic + fine-tune" in text
    assert len(staircases(qg.load("out.qg"))) == 5


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
    assert len(staircases(qg.load("out/demo/model.hardened.qg"))) == 5


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


@pytest.mark.slow
def test_quiet_prints_no_progress(model: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LOG_EVERY", 0.0)
    for arguments in (("evaluate", model, "--data", data, *EVALUATE),
                      ("compare", model, "--data", data, *EVALUATE),
                      ("harden", model, "--data", data, *HARDEN, "--force"),
                      ("ablate", model, "--data", data, *HARDEN, *EVALUATE)):
        loud, quiet = succeeds(*arguments), succeeds(*arguments, "--quiet")
        assert len(re.findall(r"^(?:harden|evaluate).*:", loud, re.MULTILINE)) > 2
        assert not re.search(r"^(harden|evaluate|\[\d/\d\]|resumed)", quiet, re.MULTILINE)
        assert set(quiet.splitlines()) <= set(loud.splitlines())


def test_version_and_help() -> None:
    assert succeeds("--version").startswith("quantguard, version ")
    text = succeeds("--help")
    for verb in ("inspect", "convert", "harden", "evaluate", "compare", "ablate", "demo"):
        assert verb in text
        assert "Usage:" in succeeds(verb, "-h")


def test_as_a_process(model: str) -> None:
    """The real thing once: where output goes, and what the shell sees."""
    def process(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "quantguard", *arguments], text=True,
                              capture_output=True, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})

    good = process("convert", model)
    assert good.returncode == 0 and "4 of 4 activations converted" in good.stdout
    assert good.stderr == ""
    bad = process("evaluate", "missing.pt", "--data", "digits")
    assert bad.returncode == 1 and bad.stdout == ""
    assert bad.stderr.startswith("Error: missing.pt does not exist\n")


# --- output files ---


@pytest.mark.parametrize("verb", ["convert", "harden"])
def test_an_existing_output_is_refused_before_any_work(verb: str, model: str, data: str,
                                                       here: Path) -> None:
    output = here / {"convert": "model.qg", "harden": "model.hardened.qg"}[verb]
    output.write_text("mine")
    arguments = [verb, model, *(("--data", data, *HARDEN) if verb == "harden" else ())]
    assert "--force" in fails(*arguments)
    assert output.read_text() == "mine"
    succeeds(*arguments, "--force")
    assert staircases(qg.load(output))


def test_a_folder_that_is_not_there_is_said_before_any_work(model: str, data: str) -> None:
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
def test_what_cannot_be_written_is_said_before_any_work(verb: str, option: str, name: str,
                                                        model: str, data: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given, "opened", None)
    more = () if verb in ("convert", "inspect") else ("--data", data)
    text = fails(verb, model, *more, option, f"/proc/{name}")
    assert text.startswith(f"Error: /proc/{name} cannot be written\n")


def test_trying_leaves_nothing_and_a_device_is_no_file(model: str, here: Path) -> None:
    given.keepable("run/one")
    given.writable("r.json")
    assert os.listdir(here) == [model]
    assert "/dev/null is no file" in fails("inspect", model, "--json", "/dev/null")


def test_a_table_is_shown_and_a_model_written_whatever_the_other_comes_to(
        model: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = qg.evaluate(torch.load(model, weights_only=False), load_data("digits", "test"),
                      suite=[PGD("ce", 1)], images=10, progress=False)
    made = Comparison({"float": row}, models={"float": nn.Sequential(nn.Flatten())})
    monkeypatch.setattr(pipeline, "ablate", lambda *args, **options: made)

    def fail(*_: Any, **options: Any) -> None:
        raise WriteError("full")

    arguments = ("ablate", model, "--data", data, "-o", "x.qg", "--json", "a.json", "--augment")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", fail)
        text = fails(*arguments)
        assert "float" in text and "Error: full" in text and Path("a.json").exists()
        assert not Path("x.qg").exists()
    told = json.loads(Path("a.json").read_text())["settings"]
    assert told == {"model": model, "arch": None, "data": data, "augment": True, "size": None}
    monkeypatch.setattr(cli, "write_text", fail)
    text = fails(*arguments)
    assert "float" in text and "Error: full" in text and Path("x.qg").exists()


def test_a_name_for_adversarials_is_checked_before_any_work(model: str) -> None:
    text = fails("evaluate", model, "--data", "digits", *EVALUATE, "--adversarials", "a.png")
    assert ".npz" in text and "Robust accuracy" not in text


def test_an_error_of_the_system_names_no_empty_file(model: str,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(given, "opened", fail)
    assert fails("inspect", model) == "Error: File too large\n"


# --- nothing is lost ---


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
def test_no_output_takes_the_place_of_an_input_or_of_another(arguments: Any, model: str,
                                                             here: Path) -> None:
    (here / "other.pt").write_bytes((here / model).read_bytes())
    (here / "d.npz").write_bytes(b"data")
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    text = fails(*arguments)
    assert "written over what is read" in text or "name the same file" in text
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


def test_what_was_measured_is_saved_before_anybody_reads_it(
        model: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any, **options: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    monkeypatch.setattr(cli.click, "echo", lambda *a, **o: None if o.get("err") else closed())
    result = run("evaluate", model, "--data", data, *EVALUATE, "--json", "a.json", "--report",
                 "a.html", "--adversarials", "a.npz")
    assert result.exit_code == 1
    assert Evaluation.load("a.json").images == 12
    assert all(Path(name).stat().st_size > 1000 for name in ("a.html", "a.npz"))


def test_what_is_written_is_said_and_so_is_that_there_are_fewer_images(model: str,
                                                                       data: str) -> None:
    text = succeeds("evaluate", model, "--data", data, "--suite", "quick", "--images", "61",
                    "--eps", "0.1", "--json", "a.json", "--report", "a.html")
    assert "wrote a.json" in text and "wrote a.html" in text
    assert "note: --images 61, and npz:small.npz has 60" in text


OWN = """
from torch import nn
class Net(nn.Sequential):
    pass
def make():
    return Net(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
"""


def test_a_class_of_the_users_own_is_said_to_need_its_code(
        here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "ownnet.py").write_text(OWN)
    monkeypatch.syspath_prepend(here)
    text = succeeds("convert", "ownnet:make", "-o", "own.qg")
    assert "note: own.qg holds a Net" in text and "--arch ownnet:make" in text
    monkeypatch.delitem(sys.modules, "ownnet")  # a command starts without it
    assert "--arch ownnet:make" in fails("inspect", "own.qg")
    assert "converted" in succeeds("inspect", "own.qg", "--trust")
    assert "converted" in succeeds("inspect", "own.qg", "--arch", "ownnet:make")
    assert "note:" not in succeeds("convert", "torchvision:resnet18", "-o", "r.qg")


# --- wrong models ---


class Unknown(nn.Module):
    """A class that only these tests know."""


class Runs:
    """Create a file when unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch was-run",)


@pytest.mark.parametrize("verb", ["inspect", "convert", "evaluate"])
@pytest.mark.parametrize(("kind", "message"), [
    ("missing", "does not exist"), ("text", "is not a model file"), ("empty", "is empty"),
    ("cut", "is damaged"), ("zip", "not one of torch.save"), ("folder", "is a directory"),
    ("class", "test_cli.Unknown"), ("code", "system"), ("state", "--arch"),
    ("tensor", "Tensor"), ("ours", "is damaged")])
def test_model_files_that_cannot_be_read(verb: str, kind: str, message: str, here: Path,
                                         cnn: nn.Module) -> None:
    path = here / "bad.pt"
    if kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.write_text("")
    elif kind == "cut":
        torch.save(cnn, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.txt", "hello")
    elif kind == "ours":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("manifest.json", "{}")
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        torch.save({"class": Unknown(), "code": Runs(), "state": cnn.state_dict(),
                    "tensor": torch.zeros(3)}[kind], path)
    arguments = ("--data", "digits") if verb == "evaluate" else ()
    assert message in fails(verb, path, *arguments)
    assert not (here / "was-run").exists()
    assert not list(here.glob("*.qg"))


@pytest.mark.parametrize(("spec", "message"), [
    ("torchvision:resnet19", "Did you mean resnet18"), ("timm:resnet19", "not one of timm"),
    ("nowhere.at.all:f", "cannot be imported"), ("json:dumps", "failed while building"),
    ("builtins:dict", "not an nn.Module")])
def test_arch_specs_that_build_nothing(spec: str, message: str, here: Path) -> None:
    assert message in fails("inspect", spec)


def test_models_without_activations_and_models_converted_twice(here: Path, converted: str) -> None:
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "linear.pt")
    assert "no activations to convert" in fails("convert", "linear.pt")
    assert "no activations to convert" in fails("inspect", "linear.pt")
    assert "converted already" in fails("convert", converted, "-o", "twice.qg")
    assert not Path("twice.qg").exists()
    assert "this one is converted" in fails("ablate", converted, "--data", "digits")


def test_a_pattern_that_matches_nothing_and_impossible_bits(model: str) -> None:
    assert "nothing-like-it" in fails("convert", model, "--keep", "nothing-like-it")
    assert "bits=9" in fails("convert", model, "--bits", "9")


# --- wrong data and settings ---


@pytest.mark.parametrize(("spec", "message"), [
    ("digit", "Did you mean digits"), ("npz:none.npz", "none.npz"), ("npz:", "npz"),
    ("imagefolder:none", "does not exist"), ("cifar10:none", "does not hold CIFAR-10"),
    ("fashion-mnist:none", "does not hold")])
@pytest.mark.parametrize("verb", ["evaluate", "harden"])
def test_data_that_is_not_there(spec: str, message: str, verb: str, model: str) -> None:
    assert message in fails(verb, model, "--data", spec)


def test_an_empty_image_folder(model: str) -> None:
    Path("images/val/cat").mkdir(parents=True)
    assert "class folders" in fails("evaluate", model, "--data", "imagefolder:images")
    Path("empty/val").mkdir(parents=True)
    assert "class folders" in fails("evaluate", model, "--data", "imagefolder:empty")


@pytest.mark.parametrize("verb", ["evaluate", "compare", "harden", "ablate", "convert"])
@pytest.mark.parametrize(("kind", "message"), [
    ("0..255", "must be in [0, 1]"), ("normalised", "normalise with mean and std"),
    ("channels", "does not accept inputs of shape"), ("size", "does not accept inputs of shape"),
    ("labels", "0..9"), ("negative", "labels are -1"), ("last", "channels last"),
    ("lengths", "19 labels"), ("nan", "holds NaN in 20 images")])
def test_npz_data_that_does_not_fit(verb: str, kind: str, message: str, model: str,
                                    here: Path, digits: Digits) -> None:
    x, y = digits[0][:20].numpy().copy(), digits[1][:20].numpy()
    x = {"0..255": x * 255, "normalised": x - 0.5, "channels": np.repeat(x, 3, 1),
         "size": x[..., :5, :5], "last": np.repeat(x.transpose(0, 2, 3, 1), 3, 3),
         "nan": np.where(x > 0.9, np.nan, x)}.get(kind, x)
    y = {"labels": y + 5, "negative": y - 1, "lengths": y[:-1]}.get(kind, y)
    if kind == "negative":
        y = np.full(20, -1)
    spec = write_npz(here / "bad.npz", x, y)
    options = ("--eps", "0.1") if verb != "convert" else ()
    if verb == "convert" and kind == "labels":
        succeeds(verb, model, "--data", spec)  # conversion looks at images only
    else:
        assert message in fails(verb, model, "--data", spec, *options)


def test_statistics_for_other_channels(model: str) -> None:
    text = fails("evaluate", model, "--data", "digits", "--mean", "0.4,0.4,0.4")
    assert "mean has 3 numbers" in text
    assert "positive" in fails("evaluate", model, "--data", "digits", "--std", "0")


@pytest.mark.parametrize(("arguments", "message"), [
    (("harden", "--recipe", "pdg"), "did you mean 'pgd'"),
    (("harden", "--set", "step=3"), "Did you mean 'steps'?"),
    (("harden", "--set", "steps"), "is not KEY=VALUE"),
    (("harden", "--set", "lr=fast"), "is not a number"),
    (("harden", "--set", "ema=2"), "ema=2"),
    (("harden", "--bits", "9"), "bits=9"),
    (("harden", "--bits", "32", "--train", "thresholds"), "no learnable thresholds"),
    (("harden", "--device", "nowhere"), "nowhere"),
    (("evaluate", "--suite", "quik"), "did you mean 'quick'"),
    (("evaluate", "--eps", "8"), "eps=0.03137 (8/255)"),
    (("evaluate", "--eps", "-0.1"), "eps=-0.1"),
    (("evaluate", "--device", "nowhere"), "nowhere"),
    (("ablate", "--recipe", "pdg"), "did you mean 'pgd'"),
    (("ablate", "--bits", "32"), "bits"),
    (("compare", "--suite", "quik"), "did you mean 'quick'")])
def test_settings_that_cannot_be_meant(arguments: tuple[str, ...], message: str,
                                       model: str, data: str) -> None:
    assert message in fails(arguments[0], model, "--data", data, *arguments[1:])


@pytest.mark.parametrize(("arguments", "message"), [
    (("--eps", "1/0"), "write 0.1 or 8/255"), (("--eps", "big"), "write 0.1 or 8/255"),
    (("--eps", "nan"), "nan"), (("--mean", "a,b"), "0.485,0.456,0.406"),
    (("--images", "0"), "--images"), (("--batch-size", "0"), "--batch-size"),
    (("--norm", "l1"), "--norm"), (("--nonsense",), "--nonsense"), (("--data",), "--data")])
def test_options_that_cannot_be_read_are_usage_errors(arguments: tuple[str, ...], message: str,
                                                      model: str) -> None:
    assert message in fails("evaluate", model, "--data", "digits", *arguments, code=2)


@pytest.mark.parametrize("verb", ["harden", "evaluate", "compare", "ablate", "sensitivity", "demo"])
@pytest.mark.parametrize("seed", ["-1", str(1 << 32)])
def test_a_seed_has_32_bits(verb: str, seed: str, model: str) -> None:
    more = () if verb == "demo" else (model, "--data", "digits")
    assert "0<=x<=4294967295" in fails(verb, *more, "--seed", seed, code=2)


def test_a_shape_that_cannot_be_read(model: str) -> None:
    assert "write 3,224,224" in fails("convert", model, "--input-shape", "1,0,8", code=2)
    succeeds("convert", model, "--input-shape", "1x8x8")


def test_a_model_named_twice(model: str) -> None:
    assert "named twice" in fails("compare", model, model, "--data", "digits")


def test_a_run_dir_of_other_settings(model: str, data: str) -> None:
    arguments = ("harden", model, "--data", data, *HARDEN, "--run-dir", "run", "--force")
    succeeds(*arguments)
    assert "other settings" in fails(*arguments, "--seed", "1")
    evaluate = ("evaluate", model, "--data", data, *EVALUATE, "--run-dir", "e")
    succeeds(*evaluate)
    assert "other settings" in fails(*evaluate, "--eps", "0.2")


def test_ctrl_c_says_how_to_go_on_and_exits_with_130(model: str, data: str,
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


def test_options_that_would_not_be_looked_at_are_refused(model: str) -> None:
    succeeds("evaluate", model, "--data", "digits", *EVALUATE, "--json", "a.json", "--quiet")
    text = fails("evaluate", model, "--data", "digits", "--replay", "a.json", "--seed", "4")
    assert "--seed would not be looked at" in text and "a.json" in text
    Path("other.json").write_text("{}")
    assert "It has no 'format'" in fails("evaluate", model, "--data", "digits", "--replay",
                                         "other.json")
    succeeds("convert", model, "-o", "low.qg", "--quiet")
    assert "activations converted" in succeeds("inspect", "low.qg", "--trust")
    assert "low.qg is converted already" in fails("inspect", "low.qg", "--trust", "--bits", "4")
    assert "does not accept inputs" in fails("inspect", model, "--input-shape", "5,8,8")
