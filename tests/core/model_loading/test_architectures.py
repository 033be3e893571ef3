"""Arch specs: which models they build, and the errors of wrong ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from user_net import NET, assert_holds

from quantguard.conversion.checkpoint import load, open_model, save
from quantguard.core.errors import LoadError
from quantguard.core.model_loading.load_model import build_arch, load_model
from quantguard.core.model_loading.model_spec import is_arch_spec, split


def test_is_arch_spec(tmp_path: Path) -> None:
    odd = tmp_path / "a:b"
    odd.write_bytes(b"")
    assert is_arch_spec("torchvision:resnet18") and is_arch_spec("a.b:c")
    assert not is_arch_spec("model.pt") and not is_arch_spec(str(odd))


def test_torchvision_and_timm_build_without_weights_or_downloads() -> None:
    net = build_arch("torchvision:resnet18")
    assert type(net).__module__ == "torchvision.models.resnet"
    assert type(build_arch("timm:resnet18.a1_in1k")).__module__ == "timm.models.resnet"
    assert load_model("torchvision:squeezenet1_1").training is False
    for name in ("ssdlite320_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "raft_small",
                 "quantized_shufflenet_v2_x0_5"):
        assert type(build_arch(f"torchvision:{name}")).__module__.startswith("torchvision.models")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_the_quick_initialisation_has_the_same_architecture(name: str) -> None:
    import torchvision

    with torch.device("meta"):
        plain = torchvision.models.get_model(name, weights=None, init_weights=True)
    assert list(build_arch(f"torchvision:{name}").state_dict()) == list(plain.state_dict())
    assert any("aux" in key.lower() for key in plain.state_dict())


@pytest.mark.parametrize(("spec", "messages"), [
    ("torchvision:resnet81", ["'resnet81' is not one of torchvision's", "resnet18"]),
    ("timm:resnt18", ["'resnt18' is not one of timm's models", "resnet18"]),
    ("timm:hf-hub:someone/model", ["not one of timm's"]),
    ("timm:local-dir:/tmp", ["not one of timm's"]),
    ("torchvision:", ["not an arch spec"]),
    ("resnet18", ["not an arch spec", "torchvision:NAME"]),
    ("qg_not_there:build", ["qg_not_there cannot be imported", "ModuleNotFoundError"]),
    ("qg_broken:build", ["qg_broken cannot be imported", "qg_not_there"]),
    ("qg_factories:biuld", ["no function or class 'biuld'", "Did you mean build?"]),
    ("qg_factories:broken", ["failed while building", "ValueError: no luck"]),
    ("qg_factories:number", ["returned a int, not an nn.Module"]),
    ("qg_factories:instance", ["instance is a Net"]),
])
def test_wrong_arch_specs(workdir: Path, spec: str, messages: list[str]) -> None:
    with pytest.raises(LoadError) as caught:
        build_arch(spec)
    assert all(message in str(caught.value) for message in messages), str(caught.value)


def test_factories_are_found_in_the_working_directory_and_sys_path_is_restored(
        workdir: Path) -> None:
    before = list(sys.path)
    assert type(build_arch("qg_factories:build")).__name__ == "Net"
    assert type(build_arch("qg_factories:Net")).__name__ == "Net"
    assert sys.path == before
    with pytest.raises(LoadError) as caught:
        build_arch("qg_factories:broken")
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("spec", ["qg_net.py:Net", "./qg_net.py:Net", "{here}/qg_net.py:Net",
                                  "sub/nets.py:Net", "pkg/inner/nets.py:Net", "sub/nets:Net"])
def test_a_file_with_python_code_is_an_arch(net: nn.Module, tmp_path: Path, spec: str) -> None:
    for folder in ("sub", "pkg/inner"):
        Path(folder).mkdir(parents=True)
        Path(folder, "sizes.py").write_text("WIDTH = 8\n")
    Path("sub/nets.py").write_text("from sizes import WIDTH\n" + NET)
    Path("pkg/__init__.py").touch()
    Path("pkg/inner/__init__.py").touch()
    Path("pkg/inner/nets.py").write_text("from .sizes import WIDTH\n" + NET)
    before = list(sys.path)
    assert type(build_arch(spec.format(here=tmp_path))).__name__ == "Net"
    assert sys.path == before


def test_a_file_with_the_name_of_a_library_is_the_file(net: nn.Module) -> None:
    Path("json.py").write_text(NET)
    assert type(build_arch("json.py:Net")).__name__ == "Net"
    assert json.loads("1") == 1


@pytest.mark.parametrize(("spec", "message"), [
    ("none.py:Net", "none.py does not exist"), ("qg_net.py:Nett", "Did you mean Net"),
    ("qg_net.py", "qg_net.py:FACTORY"), ("resnet18", "Did you mean torchvision:resnet18"),
    ("ResNet18", "Did you mean torchvision:resnet18"),
    ("qg_net:Net?width=a&", "is not KEY=VALUE"), ("qg_net:Net?depth=3", "failed while building"),
    ("torchvision:resnet18?pretrained=true", "pretrained cannot be set for"),
    ("torchvision:resnet18?weights=DEFAULT", "weights cannot be set"),
    ("timm:resnet18?checkpoint_path=a", "checkpoint_path cannot be set"),
    ("torchvision:resnet18?num_classes=x", "num_classes='x' is no number"),
    ("hf:google/vit", "Nothing is downloaded")])
def test_errors_suggest_a_correct_spec(net: nn.Module, spec: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        build_arch(spec)


@pytest.mark.parametrize(("model", "is_arch"), [
    ("C:\\models\\m.pt", False), ("C:/models/m.pt", False), ("D:m.pt", False),
    ("run 12:30.pt", False), ("s3://bucket/m.pt", False), ("https://x.org/m.pt", False),
    ("C:\\nets\\mynet.py:Net", True), ("a.b:c", True), ("timm:resnet18.a1_in1k", True),
    ("hf:/models/vit", True), ("m.pt?weights=ema", False), ("torchvision:resnet18?num_classes=3",
                                                            True)])
def test_files_and_arch_specs_are_distinguished(model: str, is_arch: bool) -> None:
    assert is_arch_spec(model) is is_arch
    if not is_arch:
        with pytest.raises(LoadError, match="does not exist"):
            load_model(model)


def test_a_file_with_a_question_mark_in_its_name_is_not_split(net: nn.Module) -> None:
    torch.save(net, "what?a=1")
    assert split("what?a=1") == ("what?a=1", {})
    with pytest.raises(LoadError, match="no setting 'wheights'"):
        load_model("what.pt?wheights=3")


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "torchvision:squeezenet1_1",
                                  "torchvision:mobilenet_v3_small", "timm:resnet10t",
                                  "timm:vit_tiny_patch16_224"])
def test_the_weights_decide_the_number_of_classes(tmp_path: Path, spec: str) -> None:
    three = build_arch(f"{spec}?num_classes=3")
    torch.save({"state_dict": three.state_dict()}, tmp_path / "c.pt")
    model = load_model(str(tmp_path / "c.pt"), arch=spec)
    assert_holds(model, three.state_dict())
    save(model, tmp_path / "m.qg", arch=spec)  # the spec has 1000 classes
    assert_holds(load(tmp_path / "m.qg"), three.state_dict())
    assert_holds(open_model(str(tmp_path / "m.qg"), arch=spec), three.state_dict())
    with pytest.raises(LoadError, match="does not fit"):
        load_model(str(tmp_path / "c.pt"), arch=f"{spec}?num_classes=4")


def test_another_architecture_is_not_mistaken_for_other_classes(tmp_path: Path) -> None:
    state = build_arch("torchvision:resnet18?num_classes=3").state_dict()
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(LoadError, match="missing from the file"):
        load_model(str(tmp_path / "c.pt"), arch="torchvision:resnet34")
