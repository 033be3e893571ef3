"""Files in quantguard's format whose model is of a user's class."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from user_net import assert_holds

import quantguard as qg
from quantguard.conversion.checkpoint import load, open_model, save
from quantguard.core.errors import LoadError


def test_a_file_is_opened_with_the_class_that_it_names(net: nn.Module) -> None:
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


def test_other_classes_than_models_are_not_created(net: nn.Module, tmp_path: Path) -> None:
    save(net, "m.qg")
    import zipfile
    with zipfile.ZipFile("m.qg") as file:
        files = {name: file.read(name) for name in file.namelist()}
    for name in ("os.abort", "subprocess.Popen", "torch.nn.Module.compile", "qg_net.nn"):
        manifest = {**json.loads(files["manifest.json"]), "class": name}
        with zipfile.ZipFile("evil.qg", "w") as file:
            for entry, content in files.items():
                file.writestr(entry,
                              json.dumps(manifest) if entry == "manifest.json" else content)
        with pytest.raises(LoadError, match="is no class of a model|is not imported"):
            load("evil.qg")


def test_arguments_in_a_file_are_not_used_without_trust(net: nn.Module) -> None:
    import qg_net
    wide = qg_net.Net(width=5)
    save(wide, "m.qg", arch="qg_net:Net?width=5")
    with pytest.raises(LoadError, match=r"--arch 'qg_net:Net\?width=5'"):
        load("m.qg")
    assert_holds(load("m.qg", trust=True), wide.state_dict())
