"""Loading whole models, state dicts and safetensors, and the errors of other files."""

from __future__ import annotations

import functools
import io
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import error_of, hostile, saved, small
from torch import Tensor, nn

from quantguard.core.model_loading.load_model import (
    build_arch,
    is_our_file,
    load_model,
)
from quantguard.core.model_loading.safe_pickle import read_pickle


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
    # The pickle is the same on the meta device, and weights take no time. torchvision's RegNet
    # draws its weights with an operation that meta tensors do not have.
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
    assert nn.Module.__setstate__ is not own or "dynamo" in own.__module__
    assert isinstance(load_model(path), nn.Sequential)


def test_functions_partials_and_enums_in_models(tmp_path: Path) -> None:
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
        registered = torch.serialization.get_safe_globals()
        assert nn.Linear in registered and relu in registered


def test_a_class_of_the_user_needs_trust(workdir: Path) -> None:
    path = saved(build_arch("qg_factories:Net"), workdir / "m.pt")
    del sys.modules["qg_factories"]
    message = error_of(path)
    assert "qg_factories.Net" in message and "--trust" in message and "m.pt" in message
    assert "qg_factories" not in sys.modules  # not even imported
    assert type(load_model(path, trust=True)).__name__ == "Net"
    del sys.modules["qg_factories"]
    (workdir / "qg_factories.py").unlink()
    message = error_of(path, trust=True)
    assert "needs a class that cannot be imported" in message and "qg_factories" in message


def test_torch_compile_wrappers(tmp_path: Path) -> None:
    compiled = torch.compile(small())
    assert "save its _orig_mod" in error_of(saved(compiled, tmp_path / "m.pt"))
    assert isinstance(load_model(str(tmp_path / "m.pt"), trust=True), nn.Sequential)
    path = saved(compiled.state_dict(), tmp_path / "s.pt")
    assert "is a state dict" in error_of(path)


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


def test_another_number_of_classes_is_named(tmp_path: Path) -> None:
    state = resnet_state()
    state["fc.weight"], state["fc.bias"] = torch.zeros(10, 512), torch.zeros(10)
    path = saved(state, tmp_path / "s.pt")
    assert load_model(path, arch="torchvision:resnet18").fc.out_features == 10
    message = error_of(path, arch="torchvision:resnet18?num_classes=4")
    assert ("fc.weight is (10, 512) in the file and (4, 512) in the model: number of classes?"
            in message)
    assert "file.py:factory" in message


def test_another_model_is_reported_with_counts(tmp_path: Path) -> None:
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
        error = error_of(str(path), trust=trust)
        assert message in error and str(path) in error


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
        warnings.simplefilter("ignore")  # torch.jit is deprecated, but its files exist
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


def test_a_whole_model_in_the_old_format_is_explained(tmp_path: Path) -> None:
    path = saved(small(), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    message = error_of(path)
    assert "old file format" in message and "--trust" in message
    assert isinstance(load_model(path, trust=True), nn.Sequential)
