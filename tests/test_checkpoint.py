"""Our own file: what goes in comes out, damaged files say so, and no code of a file is run."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn

from quantguard import checkpoint, sites
from quantguard.activation import QuantActivation, staircases
from quantguard.checkpoint import load, open_model, save
from quantguard.contexts import bypass
from quantguard.conversion import conversion_of, convert, restore
from quantguard.errors import LoadError
from quantguard.spec import QuantSpec

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True),
                         nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.2)),
                         nn.Linear(8, 3))


def tied() -> nn.Sequential:
    model = sequential()
    model[3].append(nn.Linear(8, 8))
    model[3][3].weight = model[3][0].weight
    return model


class Own(nn.Module):
    """A class that no file may bring: quantguard cannot know it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.layer(F.relu(x))))


def moved(model: nn.Module) -> nn.Module:
    """Change every parameter, learned thresholds too, and every float buffer of the model's own."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(9)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.add_(0.5)
    return model


def assert_same(ours: nn.Module, other: nn.Module, x: Tensor) -> None:
    first, second = ours.state_dict(), other.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert [(n, m.training) for n, m in ours.named_modules()] == [
        (n, m.training) for n, m in other.named_modules()]
    assert conversion_of(ours) == conversion_of(other)
    for name, staircase in staircases(ours).items():
        assert staircases(other)[name].spec == staircase.spec
    pair = copy.deepcopy(ours).eval(), copy.deepcopy(other).eval()
    assert torch.equal(pair[0](x), pair[1](x))
    with bypass(pair[0]), bypass(pair[1]):
        assert torch.equal(pair[0](x), pair[1](x))


OPTIONS: dict[str, dict[str, Any]] = {
    "fixed": {"bits": 2}, "dynamic": {"bits": 3, "dynamic": True},
    "per channel": {"bits": 2, "per_channel": True},
    "dynamic per channel": {"bits": 2, "dynamic": True, "per_channel": True},
    "mixed": {"bits": {"*": 2, "2": 8, "3.1": QuantSpec(3, True, form="tanh")}},
    "kept": {"bits": 1, "keep": "gelu"}, "one bit": {"bits": 1, "dynamic": True}}


@pytest.mark.parametrize("make", [sequential, tied])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_changed_model_comes_back_as_it_was(make: Callable[[], nn.Module],
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
def test_a_resnet_comes_back_from_its_skeleton_or_its_architecture(
        resnet: nn.Module, arch: str | None, training: bool, tmp_path: Path) -> None:
    resnet.train(training)
    save(resnet, tmp_path / "m.qg", arch=arch)
    with zipfile.ZipFile(tmp_path / "m.qg") as file:
        assert ("skeleton.pt" in file.namelist()) is (arch is None)
        if arch is None:
            assert file.getinfo("skeleton.pt").file_size < 400_000  # no weights
    loaded = load(tmp_path / "m.qg")
    assert_same(loaded, resnet, IMAGES)
    assert len(staircases(loaded)) == 17


@pytest.mark.parametrize("training", [True, False])
def test_a_float_model_comes_back(training: bool, tmp_path: Path) -> None:
    model = sequential().train(training)
    save(model, tmp_path / "m.qg")
    loaded = load(tmp_path / "m.qg")
    assert_same(loaded, model, X)
    assert not staircases(loaded)


def test_wrappers_are_taken_off(tmp_path: Path) -> None:
    model = convert(sequential())
    save(nn.DataParallel(model), tmp_path / "m.qg")
    assert_same(load(tmp_path / "m.qg"), model, X)


def test_a_class_of_ones_own_is_made_where_it_is_imported_and_else_needs_the_model(
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


def test_an_architecture_of_ones_own_is_named_but_not_run(
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
    """Ask what torch.fx answers wrongly: its graph is not what the forward computes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(F.relu(x) if isinstance(x, Tensor) else x.tanh())


def test_a_model_that_was_converted_without_graphs_comes_back(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    converted = convert(AsksTheType(), example=x)
    assert [q.spec.bits for q in staircases(converted).values()] == [2]
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


def test_calls_that_were_found_by_running_come_back_without_running(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 6)
    converted = convert(Decides(), {"*": 2, "first": 8}, example=x)
    save(converted, tmp_path / "m.qg")
    monkeypatch.setattr(sites, "discover", lambda *_: pytest.fail("it was run"))
    loaded = load(tmp_path / "m.qg", model=Decides())
    assert {name: q.spec.bits for name, q in staircases(loaded).items()} == {
        name: q.spec.bits for name, q in staircases(converted).items()}
    assert len(staircases(loaded)) == 4
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


def test_staircases_that_convert_did_not_place_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), QuantActivation.from_thresholds([0.5], 1.0))
    with pytest.raises(LoadError, match="convert did not place"):
        save(model, tmp_path / "m.qg")
    assert not list(tmp_path.iterdir())


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
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


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "m.qg"
    save(convert(sequential(), 2), path)
    return path.read_bytes()


def changed(content: bytes, change: Callable[[dict[str, bytes]], Any]) -> bytes:
    """Return the zip with its members changed."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    change(members)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, member in members.items():
            file.writestr(name, member)
    return out.getvalue()


def without(name: str) -> Callable[[dict[str, bytes]], Any]:
    return lambda members: members.pop(name)


def replaced(name: str, member: bytes) -> Callable[[dict[str, bytes]], Any]:
    return lambda members: members.update({name: member})


def manifest(**values: Any) -> Callable[[dict[str, bytes]], Any]:
    """Change fields of the manifest, or take them out."""
    def change(members: dict[str, bytes]) -> None:
        told = json.loads(members["manifest.json"]) | values
        members["manifest.json"] = json.dumps(
            {k: v for k, v in told.items() if v != "gone"}).encode()
    return change


def site(**values: Any) -> dict[str, Any]:
    return {"name": "2", "kind": "relu", "reason": "", "spec": {"bits": 2}} | values


@pytest.mark.parametrize("change", [
    without("manifest.json"), without("weights.safetensors"), without("skeleton.pt"),
    *(replaced("manifest.json", text) for text in (b"", b"{", b"[]", b"\xff\xfe\xff", b"7")),
    *(replaced("weights.safetensors", text) for text in (b"", b"x" * 40, b"\0" * 64)),
    *(replaced("skeleton.pt", text) for text in (b"", b"x" * 40, b"PK\x03\x04")),
    *(manifest(**{key: "gone"}) for key in ("format", "arch", "aliases", "sites", "audit")),
    *(manifest(format=told) for told in (0, 2, "1", [])),
    *(manifest(arch=told) for told in (3, ["torchvision:resnet18"], "torchvision:nonsense")),
    *(manifest(aliases=told) for told in ([1], 3, {"a": "b"}, {"0.weight": "4.weight"})),
    *(manifest(audit=told) for told in (5, {"ran": []}, [])),
    *(manifest(sites=told) for told in (5, [], [5], [{"name": "2"}], {"2": 1})),
    *(manifest(sites=[site(spec=spec), site(name="3.1", kind="gelu")]) for spec in (
        5, {"bits": 99}, {"bits": "2"}, {"bits": 2, "colour": 1}, {"bits": 3}, None)),
])
def test_a_damaged_file_is_a_load_error(change: Callable[[dict[str, bytes]], Any], content: bytes,
                                        tmp_path: Path) -> None:
    (tmp_path / "m.qg").write_bytes(changed(content, change))
    with pytest.raises(LoadError, match="m.qg|nonsense"):
        load(tmp_path / "m.qg")


@pytest.mark.parametrize("change", [lambda members: None, manifest(), manifest(sites=[
    site(), site(name="3.1", kind="gelu")])])
def test_unchanged_members_load(change: Callable[[dict[str, bytes]], Any], content: bytes,
                                tmp_path: Path) -> None:
    """The broken twin of the test above: repacking alone does no damage."""
    (tmp_path / "m.qg").write_bytes(changed(content, change))
    assert len(staircases(load(tmp_path / "m.qg"))) == 2


def test_a_cut_or_flipped_file_is_a_load_error_or_loads_the_same(content: bytes,
                                                                 tmp_path: Path) -> None:
    path = tmp_path / "m.qg"
    expected = _load_bytes(path, content).state_dict()
    damaged = [content[:size] for size in (0, 1, len(content) // 2, len(content) - 1)]
    for place in [*range(0, len(content), 53), *range(len(content) - 350, len(content))]:
        damaged.append(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1:])
    errors = 0
    for one in damaged:
        try:
            state = _load_bytes(path, one).state_dict()
        except LoadError:
            errors += 1
        else:
            assert all(torch.equal(v, expected[k]) for k, v in state.items())
    assert errors > len(damaged) / 2


def _load_bytes(path: Path, content: bytes) -> nn.Module:
    path.write_bytes(content)
    return load(path)


def test_what_is_no_file_of_ours_says_so(tmp_path: Path) -> None:
    torch.save(sequential(), tmp_path / "m.pt")
    (tmp_path / "empty").touch()
    with pytest.raises(LoadError, match="absent does not exist"):
        load(tmp_path / "absent")
    for path in (tmp_path, tmp_path / "m.pt", tmp_path / "empty"):
        with pytest.raises(LoadError, match="is not a file of quantguard"):
            load(path)


class Runs:
    """Pickle as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def hidden_in_a_module(attack: Runs) -> nn.Module:
    model = sequential()
    model.__dict__["note"] = attack
    return model


@pytest.mark.parametrize("wrap", [
    lambda attack: attack, lambda attack: {"model": attack}, hidden_in_a_module])
@pytest.mark.parametrize("function", ["system", "exec", "mkdir"])
@pytest.mark.parametrize("given", [False, True])
def test_code_in_a_skeleton_is_not_run(function: str, wrap: Callable[[Runs], Any], given: bool,
                                       content: bytes, tmp_path: Path) -> None:
    mark = tmp_path / "run"
    attack = {"system": Runs(os.system, f"mkdir {mark}"), "mkdir": Runs(os.mkdir, str(mark)),
              "exec": Runs(exec, f"import os; os.mkdir({str(mark)!r})")}[function]
    file = io.BytesIO()
    torch.save(wrap(attack), file)
    (tmp_path / "m.qg").write_bytes(changed(content, replaced("skeleton.pt", file.getvalue())))
    if given:  # then the skeleton is not even read
        assert len(staircases(load(tmp_path / "m.qg", model=sequential()))) == 2
    else:
        with pytest.raises(LoadError, match="Nothing was run"):
            load(tmp_path / "m.qg")
        with pytest.raises(LoadError, match="Nothing was run"):
            open_model(str(tmp_path / "m.qg"))
    assert not mark.exists()
    # The broken twin: an ordinary reader does run it.
    torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert mark.exists()


def test_a_bare_pickle_as_skeleton_is_not_run(content: bytes, tmp_path: Path) -> None:
    mark = tmp_path / "run"
    for protocol in (0, 2, 4):
        evil = pickle.dumps(Runs(os.mkdir, str(mark)), protocol)
        (tmp_path / "m.qg").write_bytes(changed(content, replaced("skeleton.pt", evil)))
        with pytest.raises(LoadError):
            load(tmp_path / "m.qg")
    assert not mark.exists()


def test_a_skeleton_that_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, file)
    (tmp_path / "m.qg").write_bytes(changed(content, replaced("skeleton.pt", file.getvalue())))
    with pytest.raises(LoadError):
        load(tmp_path / "m.qg")


def test_open_model_takes_our_file_a_torch_file_or_an_architecture(tmp_path: Path) -> None:
    model = convert(sequential()).eval()
    save(model, tmp_path / "m.qg")
    torch.save(sequential(), tmp_path / "m.pt")
    assert_same(open_model(str(tmp_path / "m.qg")), model, X)
    assert not staircases(open_model(str(tmp_path / "m.pt")))
    assert type(open_model("torchvision:squeezenet1_1")) is torchvision.models.SqueezeNet


def test_the_format_is_written_down(content: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        told = json.loads(file.read("manifest.json"))
        assert sorted(file.namelist()) == ["manifest.json", "skeleton.pt", "weights.safetensors"]
    assert told["format"] == checkpoint.FORMAT == 1
    assert told["class"] == "torch.nn.modules.container.Sequential"
    assert [row["name"] for row in told["sites"]] == ["2", "3.1"]
    assert told["sites"][0]["spec"] == {"bits": 2, "dynamic": False, "per_channel": False,
                                        "form": "uniform", "range_factor": 1.0}
