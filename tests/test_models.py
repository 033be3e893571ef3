"""MODEL specs: what loads, what is refused without running anything, and what each error says."""

from __future__ import annotations

import functools
import io
import os
import pickle
import struct
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantguard import pickles
from quantguard.errors import LoadError
from quantguard.models import build_arch, is_arch_spec, is_our_file, load_model
from quantguard.pickles import read_pickle


class Calls:
    """Pickle as a call of ``function(*arguments)``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * 36, 10)).eval()


def saved(content: object, path: Path, **options: Any) -> str:
    torch.save(content, path, **options)
    return str(path)


def error_of(*arguments: Any, **options: Any) -> str:
    with pytest.raises(LoadError) as caught:
        load_model(*arguments, **options)
    return str(caught.value)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a working directory with a module of factories, importable from there only."""
    (tmp_path / "qg_factories.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = torch.nn.Linear(3, 2)\n"
        "    def forward(self, x):\n"
        "        return self.fc(x)\n"
        "def build(): return Net()\n"
        "def number(): return 3\n"
        "def broken(): raise ValueError('no luck')\n"
        "instance = Net()\n")
    (tmp_path / "qg_broken.py").write_text("import qg_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "qg_factories", raising=False)
    return tmp_path


# --- arch specs ---


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
def test_the_quick_initialisation_keeps_the_architecture(name: str) -> None:
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


def test_factories_are_found_in_the_working_directory_which_then_leaves_the_path(
        workdir: Path) -> None:
    before = list(sys.path)
    assert type(build_arch("qg_factories:build")).__name__ == "Net"
    assert type(build_arch("qg_factories:Net")).__name__ == "Net"
    assert sys.path == before
    with pytest.raises(LoadError) as caught:
        build_arch("qg_factories:broken")
    assert isinstance(caught.value.__cause__, ValueError)


# --- whole models ---


def torchvision_models() -> list[str]:
    return ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "densenet121",
            "regnet_y_400mf", "efficientnet_b0", "convnext_tiny", "mnasnet0_5", "swin_t",
            "vit_b_16", "maxvit_t", "googlenet", "inception_v3"]


def timm_models() -> list[str]:
    return ["resnet18", "vit_tiny_patch16_224", "efficientnet_b0", "convnext_atto", "regnety_002",
            "mobilenetv3_small_050", "dm_nfnet_f0", "mixer_s32_224", "swin_tiny_patch4_window7_224",
            "deit_tiny_patch16_224", "poolformer_s12", "ghostnet_050", "repvgg_a0",
            "hrnet_w18_small", "coatnet_0_224", "levit_128s", "edgenext_xx_small",
            "res2net50_14w_8s"]


@pytest.mark.parametrize("spec", [f"torchvision:{name}" for name in torchvision_models()]
                         + [f"timm:{name}" for name in timm_models()])
def test_whole_library_models_pass_the_allow_list(spec: str) -> None:
    # On the meta device, the pickle is the same and the weights take no time; RegNet of
    # torchvision draws its weights in a way that meta tensors do not have.
    with torch.device("cpu" if "regnet_y" in spec else "meta"):
        net = build_arch(spec)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = read_pickle(file, spec)
    assert type(loaded) is type(net)
    assert list(loaded.state_dict()) == list(net.state_dict())


@pytest.mark.parametrize("content", [
    small(),
    nn.DataParallel(small()),
    {"epoch": 3, "model": small()},
], ids=["plain", "DataParallel", "checkpoint"])
def test_a_whole_model_comes_back_exactly(tmp_path: Path, content: object) -> None:
    before = set(torch.serialization.get_safe_globals())
    net = load_model(saved(content, tmp_path / "m.pt"))
    assert set(torch.serialization.get_safe_globals()) == before
    assert isinstance(net, nn.Sequential) and not net.training
    torch.manual_seed(0)
    original: Any = content["model"] if isinstance(content, dict) else content
    original = getattr(original, "module", original)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(net(x), original(x))


def test_a_whole_model_comes_back_after_torch_compile_was_used(tmp_path: Path) -> None:
    path = saved(small(), tmp_path / "m.pt")
    own = nn.Module.__setstate__
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.zeros(1, 2))
    assert nn.Module.__setstate__ is not own or "dynamo" in own.__module__  # what it watches
    assert isinstance(load_model(path), nn.Sequential)


def test_what_models_hold_besides_modules(tmp_path: Path) -> None:
    import torchvision

    net = nn.Sequential(
        torchvision.transforms.Normalize((0.5,), (0.5,)),
        nn.TransformerEncoderLayer(8, 2, activation=nn.functional.gelu, batch_first=True))
    net.norm_layer = functools.partial(nn.LayerNorm, eps=1e-6)  # type: ignore[assignment]
    net.mode = torchvision.transforms.InterpolationMode.BICUBIC  # type: ignore[assignment]
    loaded: Any = load_model(saved(net.eval(), tmp_path / "m.pt"))
    assert loaded.norm_layer.func is nn.LayerNorm and loaded.norm_layer.keywords == {"eps": 1e-6}
    assert loaded.mode is torchvision.transforms.InterpolationMode.BICUBIC
    x = torch.rand(1, 5, 8)
    assert torch.equal(loaded(x), net(x))


def test_globals_that_the_user_registered_stay_registered(tmp_path: Path) -> None:
    relu = (nn.ReLU, "torch.nn.modules.activation.ReLU")
    with torch.serialization.safe_globals([nn.Linear, relu]):
        load_model(saved(small(), tmp_path / "m.pt"))
        kept = torch.serialization.get_safe_globals()
        assert nn.Linear in kept and relu in kept


def test_a_class_of_the_users_needs_trust(workdir: Path) -> None:
    path = saved(build_arch("qg_factories:Net"), workdir / "m.pt")
    del sys.modules["qg_factories"]
    message = error_of(path)
    assert "qg_factories.Net" in message and "--trust" in message and "m.pt" in message
    assert "qg_factories" not in sys.modules  # not even imported
    assert type(load_model(path, trust=True)).__name__ == "Net"
    del sys.modules["qg_factories"]
    (workdir / "qg_factories.py").unlink()
    message = error_of(path, trust=True)
    assert "needs a class that is not here" in message and "qg_factories" in message


def test_torch_compile_wrappers(tmp_path: Path) -> None:
    compiled = torch.compile(small())
    assert "save its _orig_mod" in error_of(saved(compiled, tmp_path / "m.pt"))
    assert isinstance(load_model(str(tmp_path / "m.pt"), trust=True), nn.Sequential)
    path = saved(compiled.state_dict(), tmp_path / "s.pt")
    assert "is a state dict" in error_of(path)


# --- malicious files: refused, and nothing has run ---


def hostile(path: Path, code: bytes) -> str:
    """Write a torch.save archive whose pickle is ``code``."""
    torch.save(small().state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, code if name.endswith("/data.pkl") else record)
    return str(path)


def name_of(path: str) -> bytes:
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def test_the_attack_works_where_it_is_let(tmp_path: Path) -> None:
    """Show that the payload of the next test is a real one."""
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
    assert pickles._allowed(name) is None
    # ... and as part of a file: the name is said, though nothing calls it.
    message = error_of(hostile(tmp_path / "m.pt", b"\x80\x02" + name_of(name) + b"."))
    assert name in message


@pytest.mark.parametrize(("module", "base", "taken"), [
    ("timm.models.qg_new", nn.Module, True),
    ("timm.models_new", nn.Module, False),
    ("timm.models.qg_new", torch.jit.ScriptModule, False),
    ("timm.models.qg_new", torch.fx.GraphModule, False),
])
def test_a_new_module_is_judged_by_room_and_base(monkeypatch: pytest.MonkeyPatch, module: str,
                                                 base: type, taken: bool) -> None:
    made = types.ModuleType(module)
    made.Thing = type("Thing", (base,), {"__module__": module})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, made)
    assert (pickles._allowed(f"{module}.Thing") is not None) is taken


@pytest.mark.parametrize(("name", "value"), [
    ("torch.nn.modules.conv.Conv2d", nn.Conv2d),
    ("torch.nn.functional.relu", nn.functional.relu),
    ("torch._C._nn.gelu", nn.functional.gelu),
    ("torch.nn.parallel.data_parallel.DataParallel", nn.DataParallel),
    ("functools.partial", functools.partial),
])
def test_names_inside_the_allow_list(name: str, value: object) -> None:
    assert pickles._allowed(name) is value


LINEAR = name_of("torch.nn.modules.linear.Linear")
PARTIAL = name_of("functools.partial")


@pytest.mark.parametrize(("code", "message"), [
    # A constructor called with arguments, by REDUCE and by NEWOBJ.
    (LINEAR + b"K\x02K\x02\x86R.", "torch.nn.modules.linear.Linear"),
    (LINEAR + b"K\x02\x85\x81.", "torch.nn.modules.linear.Linear"),
    # A blank module is called: its own forward would run.
    (LINEAR + b")\x81)R.", "(an object)"),
    # A function of the list may be held, not called.
    (name_of("torch.nn.functional.relu") + b"K\x02\x85R.", "torch.nn.functional.relu"),
    # partial may be made, its result not called ...
    (PARTIAL + LINEAR + b"\x85RK\x02K\x02\x86R.", "(an object)"),
    # ... nor through the one function of torch's own list that calls what it is given.
    (name_of("torch._tensor._rebuild_from_type_v2") + b"(" + LINEAR + name_of("torch.Tensor")
     + b"K\x02K\x02\x86}tR.", "_rebuild_from_type_v2"),
    # A second state would go to a __setstate__ that the first one planted.
    (LINEAR + b")\x81q\x00}" + text("__setstate__") + PARTIAL + LINEAR + b"\x85Rsbh\x00K\x02b.",
     "given its state twice"),
    # The state of a class, and opcodes that the reader does not have.
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
    handed_over: list[object] = []
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: handed_over.append(arguments))
    assert message in error_of(path)
    assert not handed_over


# --- state dicts ---


def resnet_state() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {k: v.clone() for k, v in build_arch("torchvision:resnet18").state_dict().items()}


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 1},
    lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
    lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
    lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
], ids=["bare", "state_dict", "model+module", "compiled", "dp(compiled)", "compiled(dp)", "old"])
def test_state_dicts_fill_the_arch(tmp_path: Path, wrap: Callable[..., object]) -> None:
    state = resnet_state()
    net = load_model(saved(wrap(state), tmp_path / "s.pt"), arch="torchvision:resnet18")
    assert not net.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_both_file_formats_of_torch(tmp_path: Path, workdir: Path,
                                    options: dict[str, bool]) -> None:
    state = build_arch("qg_factories:Net").state_dict()
    net = load_model(saved(state, tmp_path / "s.pt", **options), arch="qg_factories:Net")
    assert torch.equal(net.state_dict()["fc.weight"], state["fc.weight"])


def test_safetensors(tmp_path: Path, workdir: Path) -> None:
    from safetensors.torch import save_file

    state = build_arch("qg_factories:Net").state_dict()
    path = tmp_path / "s.safetensors"
    save_file(state, path)
    net = load_model(str(path), arch="qg_factories:Net")
    assert torch.equal(net.state_dict()["fc.bias"], state["fc.bias"])
    assert "--arch" in error_of(str(path))
    path.write_bytes(path.read_bytes()[:20])
    assert "not a readable safetensors file" in error_of(str(path), arch="qg_factories:Net")


def test_mnasnet_loads_though_safetensors_lost_its_version(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = build_arch("torchvision:mnasnet0_5").state_dict()
    save_file(state, tmp_path / "s.safetensors")
    net = load_model(str(tmp_path / "s.safetensors"), arch="torchvision:mnasnet0_5")
    assert torch.equal(net.state_dict()["layers.0.weight"], state["layers.0.weight"])


def test_another_number_of_classes_is_said_plainly(tmp_path: Path) -> None:
    state = resnet_state()
    state["fc.weight"], state["fc.bias"] = torch.zeros(10, 512), torch.zeros(10)
    path = saved(state, tmp_path / "s.pt")
    assert load_model(path, arch="torchvision:resnet18").fc.out_features == 10
    message = error_of(path, arch="torchvision:resnet18?num_classes=4")
    assert ("fc.weight is (10, 512) in the file and (4, 512) in the model: number of classes?"
            in message)
    assert "file.py:factory" in message


def test_another_model_is_said_with_counts(tmp_path: Path) -> None:
    state = resnet_state()
    message = error_of(saved(state, tmp_path / "s.pt"), arch="torchvision:resnet34")
    assert "80 missing from the file: layer1.2.conv1.weight" in message
    del state["fc.bias"]
    state["head"] = torch.zeros(1)
    message = error_of(saved(state, tmp_path / "s.pt"), arch="torchvision:resnet18")
    assert "1 missing from the file: fc.bias" in message and "1 not in the model: head" in message


def test_state_dict_errors(tmp_path: Path) -> None:
    path = saved(resnet_state(), tmp_path / "s.pt")
    message = error_of(path)
    assert "is a state dict" in message and "--arch" in message
    assert "is an arch spec already" in error_of("torchvision:resnet18", arch="timm:resnet18")
    whole = saved(small(), tmp_path / "w.pt")
    assert "holds a whole Sequential" in error_of(whole, arch="torchvision:resnet18")
    assert "holds a Tensor" in error_of(saved(torch.zeros(3), tmp_path / "t.pt"))
    message = error_of(saved({"epoch": 1, "loss": 2.0}, tmp_path / "d.pt"))
    assert "'epoch', 'loss'" in message
    assert "holds a dict" in error_of(saved({0: torch.zeros(1)}, tmp_path / "i.pt"))


# --- files that are none ---


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n", "Git LFS pointer"),
    (b"<!DOCTYPE html><html></html>", "is not a model file"),
    (b"cos\nsystem\n(S'true'\ntR.", "is not a model file"),
    (b"\x80\x02", "damaged or was not written by torch.save"),
    (b"\x80\x02garbage", "damaged or was not written by torch.save"),
    (b"PK\x03\x04rest", "its end is missing"),
])
def test_files_that_are_no_models(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(content)
    for trust in (False, True):
        got = error_of(str(path), trust=trust)
        assert message in got and str(path) in got


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_truncated_files(tmp_path: Path, new: bool, share: float) -> None:
    path = tmp_path / "s.pt"
    torch.save(small().state_dict(), path, _use_new_zipfile_serialization=new)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    assert "damaged" in error_of(str(path))


def test_damage_inside_the_archive(tmp_path: Path) -> None:
    assert "damaged" in error_of(hostile(tmp_path / "m.pt", b""))
    assert "damaged" in error_of(hostile(tmp_path / "m.pt", b"\x80\x02\xff."))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert "absent.pt does not exist" in error_of(str(tmp_path / "absent.pt"))
    assert "is a directory" in error_of(str(tmp_path))
    assert "does not exist" in error_of("resnet18")


def test_other_archives(tmp_path: Path) -> None:
    script = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, its files are still about
        torch.jit.save(torch.jit.trace(small(), torch.zeros(1, 1, 8, 8)), script)
    assert "TorchScript" in error_of(str(script))
    assert "TorchScript" in error_of(str(script), trust=True)
    ours = tmp_path / "m.qg"
    with zipfile.ZipFile(ours, "w") as archive:
        archive.writestr("manifest.json", "{}")
    assert is_our_file(ours) and not is_our_file(script) and not is_our_file(tmp_path / "absent")
    assert "quantguard's own format" in error_of(str(ours))
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "hello")
    message = error_of(str(other))
    assert "not one of torch.save" in message and "readme.txt" in message


def test_a_whole_model_in_the_old_format_says_why(tmp_path: Path) -> None:
    path = saved(small(), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    message = error_of(path)
    assert "old file format" in message and "--trust" in message
    assert isinstance(load_model(path, trust=True), nn.Sequential)
