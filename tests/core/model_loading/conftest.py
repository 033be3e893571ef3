"""Working directories with a module of the user."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from user_net import NET


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of factories, importable only from there."""
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


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's model, in a working directory that has its module."""
    (tmp_path / "qg_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "qg_net", raising=False)
    import qg_net  # type: ignore[import-not-found]
    torch.manual_seed(3)
    return qg_net.Net()
