"""Wrong models, data and settings: one clear error line each."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Digits, fails, succeeds, write_npz
from torch import nn


class Unknown(nn.Module):
    """A class that only these tests know."""


class Runs:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch was-run",)


@pytest.mark.parametrize("verb", ["inspect", "convert", "evaluate"])
@pytest.mark.parametrize(("kind", "message"), [
    ("missing", "does not exist"), ("text", "is not a model file"), ("empty", "is empty"),
    ("cut", "is damaged"), ("zip", "not one of torch.save"), ("folder", "is a directory"),
    ("class", f"{Unknown.__module__}.Unknown"), ("code", "system"), ("state", "--arch"),
    ("tensor", "Tensor"), ("ours", "is damaged")])
def test_model_files_that_cannot_be_read(verb: str, kind: str, message: str, here: Path,
                                         cnn: nn.Module) -> None:
    path = here / "bad.pt"
    if kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.write_text("")
    elif kind == "cut":
        torch.save(cnn, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.txt", "hello")
    elif kind == "ours":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("manifest.json", "{}")
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        torch.save({"class": Unknown(), "code": Runs(), "state": cnn.state_dict(),
                    "tensor": torch.zeros(3)}[kind], path)
    arguments = ("--data", "digits") if verb == "evaluate" else ()
    assert message in fails(verb, path, *arguments)
    assert not (here / "was-run").exists()
    assert not list(here.glob("*.qg"))


@pytest.mark.parametrize(("spec", "message"), [
    ("torchvision:resnet19", "Did you mean resnet18"), ("timm:resnet19", "not one of timm"),
    ("nowhere.at.all:f", "cannot be imported"), ("json:dumps", "failed while building"),
    ("builtins:dict", "not an nn.Module")])
def test_arch_specs_that_build_nothing(spec: str, message: str, here: Path) -> None:
    assert message in fails("inspect", spec)


@pytest.mark.parametrize(("spec", "message"), [
    ("digit", "Did you mean digits"), ("npz:none.npz", "none.npz"), ("npz:", "npz"),
    ("imagefolder:none", "does not exist"), ("cifar10:none", "does not hold CIFAR-10"),
    ("fashion-mnist:none", "does not hold")])
@pytest.mark.parametrize("verb", ["evaluate", "harden"])
def test_missing_data(spec: str, message: str, verb: str, model: str) -> None:
    assert message in fails(verb, model, "--data", spec)


def test_an_empty_image_folder(model: str) -> None:
    Path("images/val/cat").mkdir(parents=True)
    assert "class folders" in fails("evaluate", model, "--data", "imagefolder:images")
    Path("empty/val").mkdir(parents=True)
    assert "class folders" in fails("evaluate", model, "--data", "imagefolder:empty")


@pytest.mark.parametrize("verb", ["evaluate", "compare", "harden", "ablate", "convert"])
@pytest.mark.parametrize(("kind", "message"), [
    ("0..255", "must be in [0, 1]"), ("normalised", "normalise with mean and std"),
    ("channels", "does not accept inputs of shape"), ("size", "does not accept inputs of shape"),
    ("labels", "0..9"), ("negative", "labels are -1"), ("last", "channels last"),
    ("lengths", "19 labels"), ("nan", "holds NaN in 20 images")])
def test_npz_data_that_does_not_fit(verb: str, kind: str, message: str, model: str,
                                    here: Path, digits: Digits) -> None:
    x, y = digits[0][:20].numpy().copy(), digits[1][:20].numpy()
    x = {"0..255": x * 255, "normalised": x - 0.5, "channels": np.repeat(x, 3, 1),
         "size": x[..., :5, :5], "last": np.repeat(x.transpose(0, 2, 3, 1), 3, 3),
         "nan": np.where(x > 0.9, np.nan, x)}.get(kind, x)
    y = {"labels": y + 5, "negative": y - 1, "lengths": y[:-1]}.get(kind, y)
    if kind == "negative":
        y = np.full(20, -1)
    spec = write_npz(here / "bad.npz", x, y)
    options = ("--eps", "0.1") if verb != "convert" else ()
    if verb == "convert" and kind == "labels":
        succeeds(verb, model, "--data", spec)  # conversion looks at images only
    else:
        assert message in fails(verb, model, "--data", spec, *options)


def test_statistics_for_other_channels(model: str) -> None:
    text = fails("evaluate", model, "--data", "digits", "--mean", "0.4,0.4,0.4")
    assert "mean has 3 numbers" in text
    assert "positive" in fails("evaluate", model, "--data", "digits", "--std", "0")


@pytest.mark.parametrize(("arguments", "message"), [
    (("harden", "--recipe", "pdg"), "did you mean 'pgd'"),
    (("harden", "--set", "step=3"), "Did you mean 'steps'?"),
    (("harden", "--set", "steps"), "is not KEY=VALUE"),
    (("harden", "--set", "lr=fast"), "is not a number"),
    (("harden", "--set", "ema=2"), "ema=2"),
    (("harden", "--bits", "9"), "bits=9"),
    (("harden", "--bits", "32", "--train", "thresholds"), "no learnable thresholds"),
    (("harden", "--device", "nowhere"), "nowhere"),
    (("evaluate", "--suite", "quik"), "did you mean 'quick'"),
    (("evaluate", "--eps", "8"), "eps=0.03137 (8/255)"),
    (("evaluate", "--eps", "-0.1"), "eps=-0.1"),
    (("evaluate", "--device", "nowhere"), "nowhere"),
    (("ablate", "--recipe", "pdg"), "did you mean 'pgd'"),
    (("ablate", "--bits", "32"), "bits"),
    (("compare", "--suite", "quik"), "did you mean 'quick'")])
def test_impossible_settings(arguments: tuple[str, ...], message: str,
                                       model: str, data: str) -> None:
    assert message in fails(arguments[0], model, "--data", data, *arguments[1:])


@pytest.mark.parametrize(("arguments", "message"), [
    (("--eps", "1/0"), "write 0.1 or 8/255"), (("--eps", "big"), "write 0.1 or 8/255"),
    (("--eps", "nan"), "nan"), (("--mean", "a,b"), "0.485,0.456,0.406"),
    (("--images", "0"), "--images"), (("--batch-size", "0"), "--batch-size"),
    (("--norm", "l1"), "--norm"), (("--nonsense",), "--nonsense"), (("--data",), "--data")])
def test_malformed_options_are_usage_errors(arguments: tuple[str, ...], message: str,
                                                      model: str) -> None:
    assert message in fails("evaluate", model, "--data", "digits", *arguments, code=2)
