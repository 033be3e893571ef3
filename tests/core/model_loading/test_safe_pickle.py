"""Hostile files are refused, and nothing in them is run."""

from __future__ import annotations

import functools
import os
import pickle
import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import Calls, error_of, hostile, saved, small
from torch import nn

from quantguard.core.model_loading.allow_list import allowed


def name_of(path: str) -> bytes:
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def test_the_attack_works_with_trust(tmp_path: Path) -> None:
    """The payload of the next test is effective."""
    proof = tmp_path / "ran"
    path = saved(Calls(os.system, f"touch {proof}"), tmp_path / "m.pt")
    assert "holds a int" in error_of(path, trust=True)
    assert proof.exists()


@pytest.mark.parametrize("case", ["system", "eval", "exec", "partial", "in a model", "in a hook",
                                  "plain pickle", "old format", "protocol 4"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, case: str) -> None:
    proof = tmp_path / "ran"
    path = tmp_path / "m.pt"
    python = f"open({str(proof)!r}, 'w').close()"
    system: Any = Calls(os.system, f"touch {proof}")
    named = "system"
    if case == "system":
        torch.save(system, path)
    elif case in ("eval", "exec"):
        torch.save(Calls({"eval": eval, "exec": exec}[case], python), path)
        named = f"builtins.{case}"
    elif case == "partial":
        torch.save(functools.partial(os.system, f"touch {proof}"), path)
    elif case == "in a model":
        net: Any = small()
        net.extra = system
        torch.save(net, path)
    elif case == "in a hook":
        net = small()
        net.register_forward_hook(functools.partial(os.system, f"touch {proof}"))
        torch.save(net, path)
    elif case == "plain pickle":
        path.write_bytes(pickle.dumps(system, protocol=2))
    elif case == "old format":
        torch.save(system, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(system, protocol=4))
        named = "m.pt"
    message = error_of(str(path))
    assert named in message
    assert not proof.exists()


def test_a_graph_module_is_refused(tmp_path: Path) -> None:
    net = torch.fx.symbolic_trace(small())
    message = error_of(saved(net, tmp_path / "m.pt"))
    assert "torch.fx.graph_module.reduce_graph_module" in message and "--trust" in message


@pytest.mark.parametrize("name", [
    "torch.fx.graph_module.GraphModule", "torch.jit._script.RecursiveScriptModule",
    "torchvision.models.feature_extraction.DualGraphModule",
    "timm.models._features_fx.FeatureGraphNet", "timm.models._features_fx.GraphExtractNet",
    "torch.ao.nn.quantized.modules.linear.Linear", "torch.package.package_importer.PackageImporter",
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "torchvision.models.resnet.resnet18", "torchvision.models._api.get_model",
    "torchvision.models.resnet.ResNet18_Weights", "timm.models._factory.create_model",
    "timm.models._hub.load_state_dict_from_hf", "torch.hub.load", "torch.load", "torch.from_file",
    "torch.nn.functional.importlib", "torch.nn.functional.importlib.import_module",
    "torch.nn.functional.handle_torch_function", "torch.nn.functional._verify_batch_size",
    "torch.nn.modules.module.functools", "torch.nn.modules.module.Module.compile",
    "torchvision.models.detection.image_list.ImageList", "torchvision.datasets.folder.ImageFolder",
    "torch.nn.modules.not_there.Linear", "torch.nn.modules.linear.NotThere",
    "builtins.getattr", "functools.reduce", "operator.attrgetter", "collections.abc.Callable",
    "torchvision.models.quantization.mobilenetv2.QuantStub",  # re-exported from torch.ao
])
def test_names_outside_the_allow_list(tmp_path: Path, name: str) -> None:
    assert allowed(name) is None
    # The error names it even if the pickle does not call it.
    message = error_of(hostile(tmp_path / "m.pt", b"\x80\x02" + name_of(name) + b"."))
    assert name in message


@pytest.mark.parametrize(("module", "base", "accepted"), [
    ("timm.models.qg_new", nn.Module, True),
    ("timm.models_new", nn.Module, False),
    ("timm.models.qg_new", torch.jit.ScriptModule, False),
    ("timm.models.qg_new", torch.fx.GraphModule, False),
])
def test_a_new_module_is_judged_by_package_and_base(monkeypatch: pytest.MonkeyPatch, module: str,
                                                 base: type, accepted: bool) -> None:
    new = types.ModuleType(module)
    new.Thing = type("Thing", (base,), {"__module__": module})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, new)
    assert (allowed(f"{module}.Thing") is not None) is accepted


@pytest.mark.parametrize(("name", "value"), [
    ("torch.nn.modules.conv.Conv2d", nn.Conv2d),
    ("torch.nn.functional.relu", nn.functional.relu),
    ("torch._C._nn.gelu", nn.functional.gelu),
    ("torch.nn.parallel.data_parallel.DataParallel", nn.DataParallel),
    ("functools.partial", functools.partial),
])
def test_names_inside_the_allow_list(name: str, value: object) -> None:
    assert allowed(name) is value


LINEAR = name_of("torch.nn.modules.linear.Linear")
PARTIAL = name_of("functools.partial")


@pytest.mark.parametrize(("code", "message"), [
    # A constructor with arguments, called by REDUCE and by NEWOBJ.
    (LINEAR + b"K\x02K\x02\x86R.", "torch.nn.modules.linear.Linear"),
    (LINEAR + b"K\x02\x85\x81.", "torch.nn.modules.linear.Linear"),
    # A call of an empty module would run its forward.
    (LINEAR + b")\x81)R.", "(an object)"),
    # A function of the list may be contained, but not called.
    (name_of("torch.nn.functional.relu") + b"K\x02\x85R.", "torch.nn.functional.relu"),
    # partial may be called, but not its result,
    (PARTIAL + LINEAR + b"\x85RK\x02K\x02\x86R.", "(an object)"),
    # and not through the function of torch's own list that calls its argument.
    (name_of("torch._tensor._rebuild_from_type_v2") + b"(" + LINEAR + name_of("torch.Tensor")
     + b"K\x02K\x02\x86}tR.", "_rebuild_from_type_v2"),
    # A second state would go to a __setstate__ that the first one installed.
    (LINEAR + b")\x81q\x00}" + text("__setstate__") + PARTIAL + LINEAR + b"\x85Rsbh\x00K\x02b.",
     "given its state twice"),
    # The state of a class; and opcodes that the reader does not have.
    (LINEAR + b"}b.", "given its state twice"),
    (LINEAR + b"0N.", "damaged"),
    (LINEAR + b"R.", "damaged"),
    (LINEAR + b"h\x07.", "damaged"),
    (LINEAR + b"t.", "damaged"),
    (LINEAR, "damaged"),
])
def test_calls_that_a_pickle_may_not_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          code: bytes, message: str) -> None:
    path = hostile(tmp_path / "m.pt", b"\x80\x02" + code)
    loaded: list[object] = []
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: loaded.append(arguments))
    assert message in error_of(path)
    assert not loaded
