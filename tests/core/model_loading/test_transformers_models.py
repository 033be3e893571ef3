"""Loading models of transformers from their folders."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import Calls
from torch import nn
from user_net import assert_holds, prefixed

from quantguard.conversion.checkpoint import load, save
from quantguard.core.errors import LoadError
from quantguard.core.model_loading.load_model import load_model


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
            shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in (0, 1)}
            for file, keys in shards.items():
                torch.save({k: state[k] for k in keys}, tmp_path / file)
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({
                "metadata": {}, "weight_map": {k: f for f, ks in shards.items() for k in ks}}))
    capfd.readouterr()
    opened = load_model(f"hf:{tmp_path}")
    assert type(opened) is type(model) and not opened.training
    assert_holds(opened, model.state_dict())
    assert capfd.readouterr() == ("", "")
    # architecture from the folder, weights from a file
    torch.save({"state_dict": prefixed("model.", dict(model.state_dict()))}, tmp_path / "c.ckpt")
    assert_holds(load_model(str(tmp_path / "c.ckpt"), arch=f"hf:{tmp_path}"), model.state_dict())


def test_a_model_of_transformers_is_loaded_from_our_format(vit: tuple[Path, nn.Module],
                                                          tmp_path: Path) -> None:
    _, model = vit
    save(model, tmp_path / "m.qg")
    again: Any = load(tmp_path / "m.qg")
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


def test_errors_of_folders_without_a_classifier_name_what_is_missing(
        vit: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, mark = vit[0], tmp_path / "run"

    def message(name: str, **changes: Any) -> str:
        with pytest.raises(LoadError) as caught:
            load_model(f"hf:{copied(folder, tmp_path / name, **changes)}")
        return str(caught.value)

    assert "has no model 'MyNet'" in message("own", architectures=["MyNet"], auto_map={
        "AutoModel": "modeling.MyNet"})
    assert "does not cover" in message("more", num_hidden_layers=3)
    assert "cannot be loaded" in message("wider", hidden_size=32)
    incomplete = copied(folder, tmp_path / "none")
    (incomplete / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="holds no weights"):
        load_model(f"hf:{incomplete}")
    torch.save({"x": Calls(os.mkdir, str(mark))}, incomplete / "pytorch_model.bin")
    with pytest.raises(LoadError, match="cannot be loaded"):
        load_model(f"hf:{incomplete}")
    assert not mark.exists()
    (incomplete / "config.json").write_text("[1]")
    with pytest.raises(LoadError, match="holds a list"):
        load_model(f"hf:{incomplete}")
    (incomplete / "config.json").unlink()
    with pytest.raises(LoadError, match=r"holds no config\.json"):
        load_model(f"hf:{incomplete}")
    with pytest.raises(LoadError, match=r"is a directory\n.*hf:"):
        load_model(str(folder))


def test_missing_transformers_is_an_error(
        vit: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LoadError, match="pip install transformers"):
        load_model(f"hf:{vit[0]}")
