"""Which weights of a checkpoint are found, and how their names are fitted to a model."""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from user_net import assert_holds, loaded, other, prefixed

from quantguard.core.errors import LoadError
from quantguard.core.model_loading.load_model import load_model

CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 1},
    "nested": lambda s: {"model": {"state_dict": s}, "optimizer": {"state": {0: {"m": s}}}},
    "network": lambda s: {"network": s, "best": torch.tensor(0.5)},
    "unusual key": lambda s: {"classifier_weights": s, "epoch": 1},
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
def test_weights_are_found_in_any_container(net: nn.Module, wrap: Callable[[Any], Any]) -> None:
    state = net.state_dict()
    assert_holds(loaded(wrap(state)), state)


@pytest.mark.parametrize("prefix", [
    "module.", "model.", "net.", "backbone.", "_orig_mod.", "model._orig_mod.", "_orig_mod.module.",
    "model.module.", "classifier.net.", "_forward_module.model.", "_fsdp_wrapped_module."])
def test_prefixes_of_names_are_removed(net: nn.Module, prefix: str) -> None:
    state = net.state_dict()
    assert_holds(loaded(prefixed(prefix, state)), state)


def test_wrappers_in_the_middle_of_names_are_removed(net: nn.Module) -> None:
    net.body = nn.DataParallel(net.body)
    net.head = torch.compile(net.head)  # type: ignore[assignment]
    names = list(net.state_dict())
    assert "body.module.0.weight" in names and "head._orig_mod.weight" in names
    found = list(loaded(net.state_dict()).state_dict().values())
    assert all(map(torch.equal, found, net.state_dict().values()))


def test_a_wrapped_model_gets_weights_without_prefix(net: Any) -> None:
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


def test_averaged_weights_are_preferred_and_others_chosen_by_name(
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


def test_the_used_weights_are_logged(net: nn.Module, caplog: pytest.LogCaptureFixture
                                          ) -> None:
    caplog.set_level(logging.INFO, "quantguard.model_loading")
    loaded({"state_dict": {**prefixed("model.", net.state_dict()), "loss.weight": torch.ones(3)},
            "hparams": argparse.Namespace(lr=1)})
    assert ("c.pt: weights from 'state_dict'; 'model.' removed from their names; left out: "
            "loss.weight; not read: argparse.Namespace") in caplog.text
    caplog.clear()
    loaded(net.state_dict())
    assert not caplog.records  # there was no choice and no change


def test_several_sets_of_weights_are_listed_in_an_error(net: nn.Module) -> None:
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


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: {k: v for k, v in s.items() if k != "head.bias"}, "1 missing from the file: head."),
    (lambda s: {**s, "head.weight": torch.ones(3, 9)}, r"head.weight is \(3, 9\) in the file"),
    (lambda s: {**s, "tail.weight": torch.ones(3)}, "1 not in the model: tail.weight"),
    (lambda s: {**s, "head.bias": np.zeros(3)}, "1 missing from the file: head.bias"),
    (lambda s: {k.replace("head", "fc"): v for k, v in s.items()}, "2 missing from the file")])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_that_do_not_cover_the_model_are_one_error(
        net: nn.Module, change: Callable[[Any], Any], message: str, prefix: str) -> None:
    with pytest.raises(LoadError, match=message):
        loaded({"state_dict": prefixed(prefix, change(net.state_dict()))})
