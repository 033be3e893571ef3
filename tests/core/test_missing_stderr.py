"""All functions work without a usable standard error."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from public_calls import FAST, THREAT, Batches
from torch import nn

import quantguard as qg
from quantguard.core.progress import Progress, say

pytestmark = pytest.mark.filterwarnings("ignore")


class Log:
    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)


class Broken(Log):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def _closed() -> Any:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [lambda: None, _closed, Log, Broken],
                         ids=["None", "closed", "write alone", "broken"])
def test_work_does_not_need_a_standard_error(stream: Callable[[], Any], quantized: nn.Module,
                                             batches: Batches,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    if not isinstance(stderr, Broken):
        warnings.simplefilter("always")  # Python prints them to standard error, too
    options: dict[str, Any] = {"images": 8, "suite": [qg.attacks.PGD(steps=2)]}
    qg.evaluate(quantized, batches, THREAT, **options)
    qg.harden(quantized, batches, THREAT, recipe=FAST, epochs=1)
    qg.compare({"a": quantized}, batches, THREAT, **options)
    qg.sensitivity(quantized, batches, THREAT, **options)
    qg.certify(quantized, batches, THREAT, images=2, method="ibp")
    assert sys.stderr is stderr
    if type(stderr) is Log:
        assert "harden (pgd)" in stderr.text and "\r" not in stderr.text


def test_progress_ignores_unusable_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (None, _closed(), Broken()):
        bar = Progress("x", 2, stream=stream)
        monkeypatch.setattr(sys, "stderr", stream)
        for written in (bar, Progress("y", 2)):
            written.advance(1)
            written.say("text")
            written.close()
        say("text")


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_the_command_line_runs_without_streams(closed: str, cnn: nn.Module, tmp_path: Any) -> None:
    torch.save(cnn, tmp_path / "m.pt")
    command = (f"exec {sys.executable} -m quantguard evaluate {tmp_path / 'm.pt'} --data digits "
               f"--suite quick --images 8 --json {tmp_path / 'r.json'} "
               f"--run-dir {tmp_path / 'run'} {closed}")
    assert subprocess.run(command, shell=True, env=os.environ).returncode == 0
    assert qg.Evaluation.load(tmp_path / "r.json").images == 8
