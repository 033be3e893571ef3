"""Only the weights of a checkpoint are read; other objects in it are not imported or run."""

from __future__ import annotations

import argparse
import io
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
from model_files import Calls
from torch import nn
from user_net import NET, assert_holds, prefixed

from quantguard.core.errors import LoadError
from quantguard.core.model_loading.load_model import load_model
from quantguard.core.model_loading.weights_only import read_blank


class Config:
    """A class of the training script."""

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
def test_objects_beside_the_weights_are_not_read(net: nn.Module, beside: Callable[[], Any],
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
    with suppress(LoadError):  # in the cases "among" and "storage"
        assert_holds(load_model("c.pt", arch="qg_net:Net"), net.state_dict())
        assert place != "among"
    assert not mark.exists()
    # The payload is effective: torch.load runs it.
    with suppress(RuntimeError):  # in the case "storage", after the payload has run
        torch.load("c.pt", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("code", [
    # the state of a class would change how its instances are restored
    b"cx\ny\nq\x00N}X\x0c\x00\x00\x00__setstate__csome\nthing\ns\x86b.",
    # the state of a maker would change its function
    b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\x00\x00\x00__code__N s\x86b.",
    b"\x82\x01.", b"cx\ny\n.", b"(lp0\ncx\ny\na."])
def test_a_pickle_changes_nothing_of_the_reader(code: bytes) -> None:
    before = dict(vars(torch._utils._rebuild_tensor_v2))
    with suppress(LoadError):
        read_blank(io.BytesIO(b"\x80\x02" + code), "it")
    assert vars(torch._utils._rebuild_tensor_v2) == before


def test_damaged_files_are_errors(net: nn.Module) -> None:
    torch.save({"state_dict": net.state_dict(), "a": np.float64(1)}, "c.pt",
               _use_new_zipfile_serialization=False)
    content = Path("c.pt").read_bytes()
    for end in range(20, len(content) - 1, 97):
        Path("c.pt").write_bytes(content[:end])
        with pytest.raises(LoadError):
            load_model("c.pt", arch="qg_net:Net")


SCRIPT = NET + "\nimport torch\ntorch.manual_seed(3)\ntorch.save({wrap}, 'w.pt')\n"


@pytest.mark.parametrize("wrap", ["Net(6)", "{'model': Net(6), 'epoch': 2}"])
def test_a_class_of_a_script_is_found_in_the_module_of_arch(net: nn.Module, wrap: str) -> None:
    Path("train.py").write_text(SCRIPT.replace("{wrap}", wrap))
    subprocess.run([sys.executable, "train.py"], check=True)
    with pytest.raises(LoadError, match=r"__main__\.Net"):
        load_model("w.pt")
    with pytest.raises(LoadError, match=r"(?s)A script saved it.*--arch file\.py:Class"):
        load_model("w.pt", trust=True)
    model: Any = load_model("w.pt", arch="qg_net:Net", trust=True)
    assert type(model).__module__ == "qg_net" and model.head.in_features == 6
    # without trust, arch builds the model and the file provides the weights
    assert_holds(load_model("w.pt", arch="qg_net:Net?width=6"), model.state_dict())
    with pytest.raises(LoadError, match="does not fit qg_net:Net"):
        load_model("w.pt", arch="qg_net:Net")
