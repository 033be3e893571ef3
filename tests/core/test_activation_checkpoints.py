"""Activation checkpoints change no result of training, attacks or evaluation."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from public_calls import FAST, THREAT, Batches, evaluate, harden
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import quantguard as qg
from quantguard.attacks import PixelModel
from quantguard.attacks.losses import input_gradient

pytestmark = pytest.mark.filterwarnings("ignore")


class Checkpointed(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.function = form, None
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                                  nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(128, 10)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Enable checkpoints in training, as Hugging Face's models do."""
        self.function = functools.partial(checkpoint, **options)

    def forward(self, x: Tensor) -> Tensor:
        options: dict[str, Any] = {"use_reentrant": self.form.startswith("reentrant")}
        if self.form == "none":
            x = self.body(self.stem(x))
        elif self.form.endswith("sequential"):
            x = checkpoint_sequential(self.body, 2, self.stem(x), **options)
        elif self.form == "nested":
            x = checkpoint(lambda v: checkpoint(self.body, self.stem(v), **options), x, **options)
        elif self.function is not None:
            x = self.stem(x)
            x = self.function(self.body.__call__, x) if self.training else self.body(x)
        else:
            x = checkpoint(self.body, checkpoint(self.stem, x, **options), **options)
        return self.head(x.flatten(1))


FORMS = ["reentrant", "not reentrant", "reentrant sequential", "sequential", "nested", "enabled",
         "enabled reentrant"]


def checkpointed(form: str) -> Checkpointed:
    torch.manual_seed(0)
    model = Checkpointed(form).eval()
    if form.startswith("enabled"):
        model.gradient_checkpointing_enable(use_reentrant=form.endswith("reentrant"))
    return model


RECIPES: dict[str, dict[str, Any]] = {
    "trades": {"recipe": "trades", "dynamic": True}, "pgd": {"recipe": FAST},
    "nfgsm": {"recipe": "nfgsm"}, "clean": {"recipe": "clean", "dynamic": True},
    "awp": {"recipe": qg.Recipe("pgd", awp=0.01)}, "ibp": {"recipe": "ibp"}}


@pytest.mark.parametrize(("form", "name"), [
    pytest.param(form, name, marks=[pytest.mark.slow] * (name != "trades"))
    for form in FORMS for name in RECIPES])
def test_checkpoints_change_no_trained_weight(form: str, name: str,
                                                    batches: Batches) -> None:
    options = RECIPES[name]
    plain = harden(checkpointed("none"), batches, **options).state_dict()
    found = harden(checkpointed(form), batches, **options).state_dict()
    assert plain.keys() == found.keys() and all(torch.equal(plain[k], found[k]) for k in plain)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("converted", [
    True, pytest.param(False, marks=pytest.mark.slow)])
def test_checkpoints_change_no_gradient_and_no_result(form: str, converted: bool,
                                                      batches: Batches) -> None:
    found = []
    for model in (checkpointed("none"), checkpointed(form)):
        net = qg.convert(model, data=batches, dynamic=True) if converted else model
        gradient = input_gradient(PixelModel(net, THREAT), *batches[0], "ce")[0]
        found.append((gradient, evaluate(net, batches).survived))
    assert torch.equal(found[0][0], found[1][0]) and bool(found[0][0].any())
    assert (found[0][1] == found[1][1]).all()


def test_checkpoints_recompute_again_after_a_call(batches: Batches) -> None:
    """They are off only during an attack."""
    model = checkpointed("not reentrant")
    evaluate(model, batches)
    calls = []
    model.body.register_forward_pre_hook(lambda *_: calls.append(0))
    model(batches[0][0]).sum().backward()
    assert len(calls) == 2
