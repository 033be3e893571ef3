"""Checkpoints as people have them: which weights are found, and that nothing else is run."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import pickle
import subprocess
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantguard as qg
from quantguard.blank import read_blank
from quantguard.checkpoint import load, open_model, save
from quantguard.errors import LoadError
from quantguard.model_spec import is_arch_spec, split
from quantguard.models import build_arch, load_model

NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, 3)
    def forward(self, x):
        return self.head(self.body(x.flatten(1)))
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of the user's, in a working directory that has its module."""
    (tmp_path / "qg_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "qg_net", raising=False)
    import qg_net  # type: ignore[import-not-found]
    torch.manual_seed(3)
    return qg_net.Net()


def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return other weights of the same shapes."""
    return {k: v + 1 for k, v in state.items()}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()}


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def loaded(content: object, file: str = "c.pt", **options: Any) -> nn.Module:
    torch.save(content, "c.pt")
    return load_model(file, arch="qg_net:Net", **options)


CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 1},
    "nested": lambda s: {"model": {"state_dict": s}, "optimizer": {"state": {0: {"m": s}}}},
    "network": lambda s: {"network": s, "best": torch.tensor(0.5)},
    "unheard of": lambda s: {"classifier_weights": s, "epoch": 1},
    "timm, EMA": lambda s: {"state_dict": other(s), "state_dict_ema": s},
    "torchvision, EMA": lambda s: {"model": other(s), "model_ema": {
        "n_averaged": torch.tensor(4), **prefixed("module.", s)}},
    "EMA alone": lambda s: {"ema": s},
    "EMA with its decay": lambda s: {"ema": {"decay": 0.9, "shadow": s}, "model": other(s)},
    "SWA": lambda s: {"model": other(s), "swa_state_dict": s},
    "Lightning": lambda s: {"state_dict": {**prefixed("model.", s), "loss.weight": torch.ones(3)},
                            "pytorch-lightning_version": "2.5", "callbacks": {
                                "ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}}},
    "Lightning, EMA": lambda s: {"state_dict": {**prefixed("net.", other(s)),
                                                **prefixed("ema_net.", s)}},
    "defaultdict": lambda s: {"state_dict": defaultdict(int, s), "n": np.float32(1)}}


@pytest.mark.parametrize("wrap", CONTAINERS.values(), ids=CONTAINERS)
def test_weights_are_found_wherever_they_stand(net: nn.Module, wrap: Callable[[Any], Any]) -> None:
    state = net.state_dict()
    assert_holds(loaded(wrap(state)), state)


@pytest.mark.parametrize("prefix", [
    "module.", "model.", "net.", "backbone.", "_orig_mod.", "model._orig_mod.", "_orig_mod.module.",
    "model.module.", "classifier.net.", "_forward_module.model.", "_fsdp_wrapped_module."])
def test_what_stands_before_the_names_is_taken_off(net: nn.Module, prefix: str) -> None:
    state = net.state_dict()
    assert_holds(loaded(prefixed(prefix, state)), state)


def test_wrappers_in_the_middle_of_names_are_taken_out(net: nn.Module) -> None:
    net.body = nn.DataParallel(net.body)
    net.head = torch.compile(net.head)  # type: ignore[assignment]
    names = list(net.state_dict())
    assert "body.module.0.weight" in names and "head._orig_mod.weight" in names
    got = list(loaded(net.state_dict()).state_dict().values())
    assert all(map(torch.equal, got, net.state_dict().values()))


def test_a_model_that_is_wrapped_takes_bare_weights(net: Any) -> None:
    Path("qg_lit.py").write_text("import qg_net\nfrom torch import nn\nclass Lit(nn.Module):\n"
                                 "    def __init__(self):\n        super().__init__()\n"
                                 "        self.net = qg_net.Net()\n"
                                 "    def forward(self, x): return self.net(x)\n")
    torch.save(net.state_dict(), "c.pt")
    lit: Any = load_model("c.pt", arch="qg_lit.py:Lit")
    assert_holds(lit.net, net.state_dict())


def test_averaged_models_of_torch(net: nn.Module) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.update_parameters(net)
    assert_holds(loaded(averaged.state_dict()), net.state_dict())
    torch.save(averaged, "whole.pt")
    assert_holds(load_model("whole.pt", trust=True), net.state_dict())
    assert_holds(load_model("whole.pt", arch="qg_net:Net"), net.state_dict())


def test_averaged_weights_come_first_and_others_by_name(
        net: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    ema, raw = net.state_dict(), other(net.state_dict())
    content = {"model": raw, "model_ema": ema, "epoch": 3}
    assert_holds(loaded(content), ema)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "weights from 'model_ema', averaged over training" in caplog.text
    assert "others: model (c.pt?weights=raw)" in caplog.text
    assert_holds(loaded(content, "c.pt?weights=raw"), raw)
    assert_holds(loaded(content, "c.pt?weights=model"), raw)
    assert_holds(loaded({"mine": raw, "mine_ema": ema}, "c.pt?weights=raw"), raw)
    assert_holds(loaded(content, "c.pt?weights=model_ema"), ema)
    with pytest.raises(LoadError, match=r"(?s)no weights under 'modle'.*There are: model_ema, model"
                       ):
        loaded(content, "c.pt?weights=modle")


def test_which_weights_were_taken_is_said(net: nn.Module, caplog: pytest.LogCaptureFixture
                                          ) -> None:
    caplog.set_level(logging.INFO, "quantguard.models")
    loaded({"state_dict": {**prefixed("model.", net.state_dict()), "loss.weight": torch.ones(3)},
            "hparams": argparse.Namespace(lr=1)})
    assert ("c.pt: weights from 'state_dict'; 'model.' taken off their names; left out: "
            "loss.weight; not read: argparse.Namespace") in caplog.text
    caplog.clear()
    loaded(net.state_dict())
    assert not caplog.records  # nothing was chosen, nothing changed


def test_several_sets_of_weights_are_named_not_guessed(net: nn.Module) -> None:
    state = net.state_dict()
    with pytest.raises(LoadError, match=r"(?s)several sets of weights: student, teacher.*"
                                        r"c.pt\?weights=student"):
        loaded({"student": state, "teacher": other(state)})
    assert_holds(loaded({"student": state, "teacher": other(state)}, "c.pt?weights=teacher"),
                 other(state))
    both = {**prefixed("student.", state), **prefixed("teacher.", other(state))}
    with pytest.raises(LoadError, match=r"several sets of weights that fit: student\., teacher\."):
        loaded(both)
    assert_holds(loaded({"state_dict": both}, "c.pt?weights=teacher"), other(state))


@pytest.mark.parametrize(("change", "said"), [
    (lambda s: {k: v for k, v in s.items() if k != "head.bias"}, "1 missing from the file: head."),
    (lambda s: {**s, "head.weight": torch.ones(3, 9)}, r"head.weight is \(3, 9\) in the file"),
    (lambda s: {**s, "tail.weight": torch.ones(3)}, "1 not in the model: tail.weight"),
    (lambda s: {**s, "head.bias": np.zeros(3)}, "1 missing from the file: head.bias"),
    (lambda s: {k.replace("head", "fc"): v for k, v in s.items()}, "2 missing from the file")])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_that_do_not_cover_the_model_are_one_error(
        net: nn.Module, change: Callable[[Any], Any], said: str, prefix: str) -> None:
    with pytest.raises(LoadError, match=said):
        loaded({"state_dict": prefixed(prefix, change(net.state_dict()))})


class Config:
    """A class of the script that trained."""

    def __init__(self) -> None:
        self.lr, self.where = 0.1, Path("runs")


BESIDE: dict[str, Callable[[], Any]] = {
    "numpy scalar": lambda: np.float64(0.5), "numpy array": lambda: np.ones(3),
    "Namespace": lambda: argparse.Namespace(lr=0.1, milestones=[1, 2]), "own class": Config,
    "path": lambda: Path("runs"), "function": lambda: prefixed, "method": lambda: Config().__init__,
    "set": lambda: {1, 2}, "bytes": lambda: b"abc", "complex": lambda: 1j,
    "defaultdict": lambda: defaultdict(list, a=[1]), "ordered": lambda: OrderedDict(a=1),
    "optimizer": lambda: torch.optim.SGD([nn.Parameter(torch.ones(1))]),
    "dtype": lambda: (torch.float16, torch.device("cpu"), torch.Size([1]))}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("options", [
    {}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}],
    ids=["zip", "old", "protocol 4"])
def test_what_stands_beside_the_weights_is_not_read(net: nn.Module, beside: Callable[[], Any],
                                                    options: dict[str, Any]) -> None:
    torch.save({"state_dict": net.state_dict(), "other": beside()}, "c.pt", **options)
    assert_holds(load_model("c.pt", arch="qg_net:Net"), net.state_dict())


@pytest.mark.parametrize("write", [
    torch.save, lambda o, f: torch.save(o, f, _use_new_zipfile_serialization=False),
    lambda o, f: Path(f).write_bytes(pickle.dumps(o)),
    lambda o, f: Path(f).write_bytes(pickle.dumps(o, 2)),
    lambda o, f: torch.save({"ema": o, "model": None}, f)],
    ids=["zip", "old", "pickle", "pickle 2", "in a checkpoint"])
def test_the_weights_of_a_whole_model_are_read_without_its_class(
        net: nn.Module, write: Callable[[Any, str], Any]) -> None:
    write(nn.DataParallel(net), "w.pt")
    del sys.modules["qg_net"]
    with pytest.raises(LoadError, match="--arch"):
        load_model("w.pt")
    assert "qg_net" not in sys.modules
    assert_holds(load_model("w.pt", arch="qg_net:Net"), net.state_dict())


class Calls:
    """Pickle as a call of ``function(*arguments)``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def attacks(mark: str) -> dict[str, Any]:
    net: Any = nn.Linear(1, 1)
    net.hidden = Calls(os.mkdir, mark)
    return {"system": Calls(os.system, f"mkdir {mark}"), "exec": Calls(
        exec, f"import os; os.mkdir({mark!r})"), "in a module": net, "loads": Calls(
            pickle.loads, pickle.dumps(Calls(os.mkdir, mark))), "storage": Calls(
                torch.storage._load_from_bytes, pickle.dumps(Calls(os.mkdir, mark)))}


@pytest.mark.parametrize("attack", list(attacks("")))
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("place", ["beside", "among", "key"])
def test_code_beside_the_weights_is_not_run(net: nn.Module, tmp_path: Path, attack: str,
                                            options: dict[str, Any], place: str) -> None:
    mark = tmp_path / "run"
    evil = attacks(str(mark))[attack]
    content = {"beside": lambda: {"state_dict": net.state_dict(), "x": evil},
               "among": lambda: {**net.state_dict(), "head.bias": evil},
               "key": lambda: {"state_dict": net.state_dict(), (1, evil): 1}}[place]()
    torch.save(content, "c.pt", **options)
    with suppress(LoadError):  # "among", and "storage": what is in it is none
        assert_holds(load_model("c.pt", arch="qg_net:Net"), net.state_dict())
        assert place != "among"
    assert not mark.exists()
    # The broken twin: an ordinary reader does run it.
    with suppress(RuntimeError):  # of a storage that is none, once it was read
        torch.load("c.pt", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("code", [
    # the state of a class: what its instances would be restored by
    b"cx\ny\nq\x00N}X\x0c\x00\x00\x00__setstate__csome\nthing\ns\x86b.",
    # a maker gets another function
    b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\x00\x00\x00__code__N s\x86b.",
    b"\x82\x01.", b"cx\ny\n.", b"(lp0\ncx\ny\na."])
def test_a_pickle_changes_nothing_of_the_reader(code: bytes) -> None:
    before = dict(vars(torch._utils._rebuild_tensor_v2))
    with suppress(LoadError):
        read_blank(io.BytesIO(b"\x80\x02" + code), "it")
    assert vars(torch._utils._rebuild_tensor_v2) == before


def test_damaged_files_stay_errors(net: nn.Module) -> None:
    torch.save({"state_dict": net.state_dict(), "a": np.float64(1)}, "c.pt",
               _use_new_zipfile_serialization=False)
    content = Path("c.pt").read_bytes()
    for end in range(20, len(content) - 1, 97):
        Path("c.pt").write_bytes(content[:end])
        with pytest.raises(LoadError):
            load_model("c.pt", arch="qg_net:Net")


# --- what a script pickled from its __main__ ---


SCRIPT = NET + "\nimport torch\ntorch.manual_seed(3)\ntorch.save({wrap}, 'w.pt')\n"


@pytest.mark.parametrize("wrap", ["Net(6)", "{'model': Net(6), 'epoch': 2}"])
def test_a_scripts_own_class_is_found_where_arch_says(net: nn.Module, wrap: str) -> None:
    Path("train.py").write_text(SCRIPT.replace("{wrap}", wrap))
    subprocess.run([sys.executable, "train.py"], check=True)
    with pytest.raises(LoadError, match=r"__main__\.Net"):
        load_model("w.pt")
    with pytest.raises(LoadError, match=r"(?s)A script saved it.*--arch file\.py:Class"):
        load_model("w.pt", trust=True)
    model: Any = load_model("w.pt", arch="qg_net:Net", trust=True)
    assert type(model).__module__ == "qg_net" and model.head.in_features == 6
    # without trust the class is built as arch says, and the file gives its weights
    assert_holds(load_model("w.pt", arch="qg_net:Net?width=6"), model.state_dict())
    with pytest.raises(LoadError, match="does not fit qg_net:Net"):
        load_model("w.pt", arch="qg_net:Net")


# --- arch specs ---


@pytest.mark.parametrize("spec", ["qg_net.py:Net", "./qg_net.py:Net", "{here}/qg_net.py:Net",
                                  "sub/nets.py:Net", "pkg/inner/nets.py:Net", "sub/nets:Net"])
def test_a_file_with_python_code_is_an_arch(net: nn.Module, tmp_path: Path, spec: str) -> None:
    for folder in ("sub", "pkg/inner"):
        Path(folder).mkdir(parents=True)
        Path(folder, "parts.py").write_text("WIDTH = 8\n")
    Path("sub/nets.py").write_text("from parts import WIDTH\n" + NET)
    Path("pkg/__init__.py").touch()
    Path("pkg/inner/__init__.py").touch()
    Path("pkg/inner/nets.py").write_text("from .parts import WIDTH\n" + NET)
    before = list(sys.path)
    assert type(build_arch(spec.format(here=tmp_path))).__name__ == "Net"
    assert sys.path == before


def test_a_file_with_the_name_of_a_library_is_still_that_file(net: nn.Module) -> None:
    Path("json.py").write_text(NET)
    assert type(build_arch("json.py:Net")).__name__ == "Net"
    assert json.loads("1") == 1


@pytest.mark.parametrize(("spec", "said"), [
    ("none.py:Net", "none.py does not exist"), ("qg_net.py:Nett", "Did you mean Net"),
    ("qg_net.py", "qg_net.py:FACTORY"), ("resnet18", "Did you mean torchvision:resnet18"),
    ("ResNet18", "Did you mean torchvision:resnet18"),
    ("qg_net:Net?width=a&", "is not KEY=VALUE"), ("qg_net:Net?depth=3", "failed while building"),
    ("torchvision:resnet18?pretrained=true", "pretrained cannot be set"),
    ("torchvision:resnet18?weights=DEFAULT", "weights cannot be set"),
    ("timm:resnet18?checkpoint_path=a", "checkpoint_path cannot be set"),
    ("torchvision:resnet18?num_classes=x", "num_classes='x' is no number"),
    ("hf:google/vit", "Nothing is downloaded")])
def test_what_is_no_arch_says_what_may_be_meant(net: nn.Module, spec: str, said: str) -> None:
    with pytest.raises(LoadError, match=said):
        build_arch(spec)


@pytest.mark.parametrize(("model", "is_arch"), [
    ("C:\\models\\m.pt", False), ("C:/models/m.pt", False), ("D:m.pt", False),
    ("run 12:30.pt", False), ("s3://bucket/m.pt", False), ("https://x.org/m.pt", False),
    ("C:\\nets\\mynet.py:Net", True), ("a.b:c", True), ("timm:resnet18.a1_in1k", True),
    ("hf:/models/vit", True), ("m.pt?weights=ema", False), ("torchvision:resnet18?num_classes=3",
                                                            True)])
def test_files_and_arch_specs_are_told_apart(model: str, is_arch: bool) -> None:
    assert is_arch_spec(model) is is_arch
    if not is_arch:
        with pytest.raises(LoadError, match="does not exist"):
            load_model(model)


def test_a_file_with_a_question_mark_in_its_name_is_that_file(net: nn.Module) -> None:
    torch.save(net, "what?a=1")
    assert split("what?a=1") == ("what?a=1", {})
    with pytest.raises(LoadError, match="no setting 'wheights'"):
        load_model("what.pt?wheights=3")


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "torchvision:squeezenet1_1",
                                  "torchvision:mobilenet_v3_small", "timm:resnet10t",
                                  "timm:vit_tiny_patch16_224"])
def test_weights_of_other_classes_build_other_heads(tmp_path: Path, spec: str) -> None:
    three = build_arch(f"{spec}?num_classes=3")
    torch.save({"state_dict": three.state_dict()}, tmp_path / "c.pt")
    model = load_model(str(tmp_path / "c.pt"), arch=spec)
    assert_holds(model, three.state_dict())
    save(model, tmp_path / "m.qg", arch=spec)  # the name of the 1000 classes' model
    assert_holds(load(tmp_path / "m.qg"), three.state_dict())
    assert_holds(open_model(str(tmp_path / "m.qg"), arch=spec), three.state_dict())
    with pytest.raises(LoadError, match="does not fit"):
        load_model(str(tmp_path / "c.pt"), arch=f"{spec}?num_classes=4")


def test_another_architecture_is_not_mistaken_for_other_classes(tmp_path: Path) -> None:
    state = build_arch("torchvision:resnet18?num_classes=3").state_dict()
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(LoadError, match="missing from the file"):
        load_model(str(tmp_path / "c.pt"), arch="torchvision:resnet34")


# --- our own files, of a class of the user's ---


def test_a_file_of_ours_is_opened_by_the_class_that_it_names(net: nn.Module) -> None:
    x = torch.rand(4, 16)
    converted = qg.convert(net.eval(), 2)
    save(converted, "m.qg", arch="qg_net:Net")
    assert torch.equal(load("m.qg")(x), converted(x))  # imported already
    del sys.modules["qg_net"]
    with pytest.raises(LoadError, match=r"(?s)qg_net\.Net is not imported.*--arch qg_net:Net"):
        load("m.qg")
    assert "qg_net" not in sys.modules
    assert torch.equal(load("m.qg", trust=True)(x), converted(x))
    del sys.modules["qg_net"]
    assert torch.equal(open_model("m.qg", trust=True)(x), converted(x))
    assert torch.equal(open_model("m.qg", arch="qg_net.py:Net")(x), converted(x))


def test_a_class_that_is_not_the_models_is_not_made(net: nn.Module, tmp_path: Path) -> None:
    save(net, "m.qg")
    import zipfile
    with zipfile.ZipFile("m.qg") as file:
        files = {name: file.read(name) for name in file.namelist()}
    for name in ("os.abort", "subprocess.Popen", "torch.nn.Module.compile", "qg_net.nn"):
        manifest = {**json.loads(files["manifest.json"]), "class": name}
        with zipfile.ZipFile("evil.qg", "w") as file:
            for part, content in files.items():
                file.writestr(part, json.dumps(manifest) if part == "manifest.json" else content)
        with pytest.raises(LoadError, match="is no class of a model|is not imported"):
            load("evil.qg")


def test_arguments_of_a_file_are_not_given_without_trust(net: nn.Module) -> None:
    import qg_net
    wide = qg_net.Net(width=5)
    save(wide, "m.qg", arch="qg_net:Net?width=5")
    with pytest.raises(LoadError, match=r"--arch 'qg_net:Net\?width=5'"):
        load("m.qg")
    assert_holds(load("m.qg", trust=True), wide.state_dict())


# --- transformers ---


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A small ViT of transformers, and the folder that it was saved in."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8, num_labels=3)).eval()
    folder = tmp_path_factory.mktemp("vit")
    model.save_pretrained(folder)
    return folder, model


def copied(folder: Path, to: Path, **changes: Any) -> Path:
    """Copy a folder, with changes in its config.json."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    settings = {**json.loads((to / "config.json").read_text()), **changes}
    (to / "config.json").write_text(json.dumps(settings))
    return to


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin", "bin shards"])
def test_a_folder_of_transformers_is_opened(vit: tuple[Path, nn.Module], tmp_path: Path, form: str,
                                            capfd: pytest.CaptureFixture[str]) -> None:
    folder, model = vit
    saver: Any = model
    if form == "shards":
        saver.save_pretrained(tmp_path, max_shard_size="8KB")
        assert (tmp_path / "model.safetensors.index.json").exists()
    else:
        copied(folder, tmp_path / "copy")
        tmp_path = tmp_path / "copy"
    if form.startswith("bin"):
        (tmp_path / "model.safetensors").unlink()
        state = dict(model.state_dict())
        if form == "bin":
            torch.save(state, tmp_path / "pytorch_model.bin")
        else:
            names = list(state)
            parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in (0, 1)}
            for file, keys in parts.items():
                torch.save({k: state[k] for k in keys}, tmp_path / file)
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({
                "metadata": {}, "weight_map": {k: f for f, ks in parts.items() for k in ks}}))
    capfd.readouterr()
    opened = load_model(f"hf:{tmp_path}")
    assert type(opened) is type(model) and not opened.training
    assert_holds(opened, model.state_dict())
    assert capfd.readouterr() == ("", "")
    # the folder as architecture, weights as a file
    torch.save({"state_dict": prefixed("model.", dict(model.state_dict()))}, tmp_path / "c.ckpt")
    assert_holds(load_model(str(tmp_path / "c.ckpt"), arch=f"hf:{tmp_path}"), model.state_dict())


def test_a_model_of_transformers_comes_back_from_our_file(vit: tuple[Path, nn.Module],
                                                          tmp_path: Path) -> None:
    _, model = vit
    save(model, tmp_path / "m.qg")
    again: Any = load(tmp_path / "m.qg")
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


def test_folders_that_are_not_a_classifier_say_what_is_missing(
        vit: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, mark = vit[0], tmp_path / "run"

    def said(name: str, **changes: Any) -> str:
        with pytest.raises(LoadError) as caught:
            load_model(f"hf:{copied(folder, tmp_path / name, **changes)}")
        return str(caught.value)

    assert "has no model 'MyNet'" in said("own", architectures=["MyNet"], auto_map={
        "AutoModel": "modeling.MyNet"})
    assert "does not cover" in said("more", num_hidden_layers=3)
    assert "cannot be loaded" in said("wider", hidden_size=32)
    lacking = copied(folder, tmp_path / "none")
    (lacking / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="holds no weights"):
        load_model(f"hf:{lacking}")
    torch.save({"x": Calls(os.mkdir, str(mark))}, lacking / "pytorch_model.bin")
    with pytest.raises(LoadError, match="cannot be loaded"):
        load_model(f"hf:{lacking}")
    assert not mark.exists()
    (lacking / "config.json").write_text("[1]")
    with pytest.raises(LoadError, match="holds a list"):
        load_model(f"hf:{lacking}")
    (lacking / "config.json").unlink()
    with pytest.raises(LoadError, match=r"holds no config\.json"):
        load_model(f"hf:{lacking}")
    with pytest.raises(LoadError, match=r"is a directory\n.*hf:"):
        load_model(str(folder))


def test_transformers_that_is_not_installed_is_one_error(
        vit: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LoadError, match="pip install transformers"):
        load_model(f"hf:{vit[0]}")
