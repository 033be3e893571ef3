"""Models saved to .qg files and loaded again."""

from __future__ import annotations

import copy
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from checkpoint_models import IMAGES, X, assert_same, moved, sequential, tied
from torch import Tensor, nn

from quantguard.conversion import sites
from quantguard.conversion.checkpoint import load, open_model, save
from quantguard.conversion.converter import conversion_of, convert, restore
from quantguard.core.errors import LoadError
from quantguard.core.specs import QuantSpec
from quantguard.nn.quant_activation import QuantActivation, quantizers


class Own(nn.Module):
    """User class, which a file cannot contain."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.layer(F.relu(x))))


OPTIONS: dict[str, dict[str, Any]] = {
    "fixed": {"bits": 2}, "dynamic": {"bits": 3, "dynamic": True},
    "per channel": {"bits": 2, "per_channel": True},
    "dynamic per channel": {"bits": 2, "dynamic": True, "per_channel": True},
    "mixed": {"bits": {"*": 2, "2": 8, "3.1": QuantSpec(3, True, form="tanh")}},
    "excluded": {"bits": 1, "exclude": "gelu"}, "one bit": {"bits": 1, "dynamic": True}}


@pytest.mark.parametrize("make", [sequential, tied])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_changed_model_is_saved_and_loaded(make: Callable[[], nn.Module],
                                              options: dict[str, Any], tmp_path: Path) -> None:
    model = moved(convert(make(), **options))
    model[3].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save(model, tmp_path / "m.qg")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    loaded = load(tmp_path / "m.qg")
    assert_same(loaded, model, X)
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    assert torch.equal(restore(loaded).eval()(X), restore(model).eval()(X))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    loaded_models = []
    for model in (tied(), convert(tied())):
        save(model, tmp_path / "m.qg")
        loaded_models.append(load(tmp_path / "m.qg"))
        assert loaded_models[-1][3][3].weight is loaded_models[-1][3][0].weight
    with zipfile.ZipFile(tmp_path / "m.qg") as file:
        assert json.loads(file.read("manifest.json"))["aliases"] == {
            "3.3.weight": "3.0.weight"}


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    return moved(convert(model, 2, True, example=IMAGES))


@pytest.mark.parametrize(("arch", "training"), [
    (None, True), ("torchvision:resnet18", True), ("torchvision:resnet18", False)])
def test_a_resnet_is_rebuilt_from_its_skeleton_or_its_architecture(
        resnet: nn.Module, arch: str | None, training: bool, tmp_path: Path) -> None:
    resnet.train(training)
    save(resnet, tmp_path / "m.qg", arch=arch)
    with zipfile.ZipFile(tmp_path / "m.qg") as file:
        assert ("skeleton.pt" in file.namelist()) is (arch is None)
        if arch is None:
            assert file.getinfo("skeleton.pt").file_size < 400_000  # no weights
    loaded = load(tmp_path / "m.qg")
    assert_same(loaded, resnet, IMAGES)
    assert len(quantizers(loaded)) == 17


@pytest.mark.parametrize("training", [True, False])
def test_a_float_model_is_saved_and_loaded(training: bool, tmp_path: Path) -> None:
    model = sequential().train(training)
    save(model, tmp_path / "m.qg")
    loaded = load(tmp_path / "m.qg")
    assert_same(loaded, model, X)
    assert not quantizers(loaded)


def test_wrappers_are_removed(tmp_path: Path) -> None:
    model = convert(sequential())
    save(nn.DataParallel(model), tmp_path / "m.qg")
    assert_same(load(tmp_path / "m.qg"), model, X)


def test_a_user_class_is_created_if_it_is_imported_and_else_needs_the_model(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    float_model = Own()
    model = moved(convert(float_model, 2, True))
    save(model, tmp_path / "m.qg")
    assert_same(load(tmp_path / "m.qg"), model, X)
    with monkeypatch.context() as without:
        without.delitem(sys.modules, __name__)
        with pytest.raises(LoadError, match=r"(?s)holds a \S*Own, which only your own code.*"
                                            rf"--arch {__name__}:Own.*model="):
            load(tmp_path / "m.qg")
    before = {k: v.clone() for k, v in float_model.state_dict().items()}
    assert_same(load(tmp_path / "m.qg", model=float_model), model, X)
    assert_same(load(tmp_path / "m.qg", model=nn.DataParallel(Own())), model, X)
    assert all(torch.equal(v, before[k]) for k, v in float_model.state_dict().items())
    assert type(float_model) is Own


def test_a_user_architecture_is_named_but_not_run(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qg_side_effect.py").write_text(
        "import pathlib\npathlib.Path('imported').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    save(convert(Own()), "m.qg", arch="qg_side_effect:make")
    monkeypatch.delitem(sys.modules, __name__)
    with pytest.raises(LoadError, match="--arch qg_side_effect:make"):
        load("m.qg")
    assert not Path("imported").exists() and "qg_side_effect" not in sys.modules


class AsksTheType(nn.Module):
    """Model with a type check that is wrong under torch.fx, so that its graph is wrong."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(F.relu(x) if isinstance(x, Tensor) else x.tanh())


def test_a_model_that_was_converted_without_graphs_is_saved_and_loaded(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    converted = convert(AsksTheType(), example=x)
    assert [q.spec.bits for q in quantizers(converted).values()] == [2]
    done = conversion_of(converted)
    assert done is not None and "" in done.plan.unread
    save(converted, tmp_path / "m.qg")
    loaded = load(tmp_path / "m.qg", model=AsksTheType())
    assert conversion_of(loaded) == done
    assert torch.equal(loaded(x), converted(x))


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.last = nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = F.leaky_relu(h, 0.2) if h.sum() > 0 else h * (h > 0)
        for _ in range(2):
            h = self.act(h)
        return self.last(h)


def test_recorded_calls_are_loaded_without_running_the_model(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 6)
    converted = convert(Decides(), {"*": 2, "first": 8}, example=x)
    save(converted, tmp_path / "m.qg")
    monkeypatch.setattr(sites, "discover", lambda *_: pytest.fail("it was run"))
    loaded = load(tmp_path / "m.qg", model=Decides())
    assert {name: q.spec.bits for name, q in quantizers(loaded).items()} == {
        name: q.spec.bits for name, q in quantizers(converted).items()}
    assert len(quantizers(loaded)) == 4
    for inputs in (x, -9 * x):
        assert torch.equal(loaded(inputs), converted(inputs))


@pytest.mark.parametrize(("other", "says"), [
    (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
     "made from another model than this Sequential"),
    (lambda: nn.Sequential(*sequential()[:-1], nn.Linear(8, 4)), "do not fit"),
    (lambda: nn.Sequential(*sequential(), nn.Linear(3, 3)), "do not fit")])
def test_another_model_is_an_error(other: Callable[[], nn.Module], says: str,
                                   tmp_path: Path) -> None:
    save(convert(sequential()), tmp_path / "m.qg")
    with pytest.raises(LoadError, match=says):
        load(tmp_path / "m.qg", model=other())


def test_quantizers_that_convert_did_not_add_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), QuantActivation.from_thresholds([0.5], 1.0))
    with pytest.raises(LoadError, match="convert did not add"):
        save(model, tmp_path / "m.qg")
    assert not list(tmp_path.iterdir())


def test_state_that_is_not_a_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(LoadError, match=r"'1._extra_state' .* is a dict, not a tensor"):
        save(nn.Sequential(nn.ReLU(), Extra(2, 2)), tmp_path / "m.qg")


@pytest.mark.parametrize("failing", ["writestr", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
        failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.qg"
    old = convert(sequential())
    save(old, path)
    before = path.read_bytes()

    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(*{"writestr": (zipfile.ZipFile, "writestr", fail),
                          "replace": (os, "replace", fail)}[failing])
    with pytest.raises(OSError, match="disk full"):
        save(moved(copy.deepcopy(old)), path)
    monkeypatch.undo()
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    save(moved(copy.deepcopy(old)), path)
    assert path.read_bytes() != before and list(tmp_path.iterdir()) == [path]


def test_open_model_accepts_a_qg_file_a_torch_file_or_an_architecture(tmp_path: Path) -> None:
    model = convert(sequential()).eval()
    save(model, tmp_path / "m.qg")
    torch.save(sequential(), tmp_path / "m.pt")
    assert_same(open_model(str(tmp_path / "m.qg")), model, X)
    assert not quantizers(open_model(str(tmp_path / "m.pt")))
    assert type(open_model("torchvision:squeezenet1_1")) is torchvision.models.SqueezeNet
