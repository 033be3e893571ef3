"""A model brings its threat, normalisation, classes and size along, and every verb uses them."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import quantguard as qg
from quantguard.attacks import PGD, suites
from quantguard.checkpoint import open_model
from quantguard.cli import main
from quantguard.data import load_data
from quantguard.demo import small_cnn, train_clean
from quantguard.errors import DataError, LoadError, SpecError
from quantguard.metadata import annotate, class_names_of, metadata_of

Digits = tuple[Tensor, Tensor]
MEAN, STD = 0.3, 0.4
OWN = qg.Threat(eps=0.05, mean=MEAN, std=STD)
QUICK: dict[str, Any] = {"suite": [PGD("ce", 2)], "progress": False, "images": 40}
TRAIN = ("--epochs", "1", "--set", "steps=1", "--set", "lr=1e-3")


@pytest.fixture(autouse=True)
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites._SUITES, "quick", (2, 2, 8))
    monkeypatch.setattr(suites, "MODES", ("sigmoid(8)",))
    monkeypatch.setattr(suites, "TWINS", suites.TWINS[:1])


@pytest.fixture(scope="module")
def normalised() -> nn.Module:
    """The demo's CNN, trained on digits of mean 0.3 and std 0.4."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_cnn()
        train_clean(model, load_data("digits", "train", batch_size=64, mean=MEAN, std=STD), 3,
                    progress=False)
    return model


@pytest.fixture(scope="module")
def hardened(normalised: nn.Module) -> nn.Module:
    train: Any = load_data("digits", "train", batch_size=64, mean=MEAN, std=STD)
    few = DataLoader(Subset(train.dataset, range(300)), batch_size=64)
    return qg.harden(normalised, few, OWN, epochs=1, progress=False,
                     recipe=qg.Recipe("pgd", steps=1, lr=1e-3))


@pytest.fixture(scope="module")
def loader(digits: Digits) -> list[Digits]:
    return [((digits[0] - MEAN) / STD, digits[1])]


@pytest.fixture
def here(tmp_path: Path, normalised: nn.Module, hardened: nn.Module,
         monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(normalised, "net.pt")
    qg.save(hardened, "net.qg")
    return tmp_path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def succeeds(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output or repr(result.exception)
    return result.output


def fails(*arguments: Any) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1, result.output
    assert "Error: " in result.output and "Traceback" not in result.output
    return result.output


def right(model: nn.Module, loader: list[Digits], rows: Any = slice(None)) -> int:
    """An oracle of its own: how many images the model is right about, by a plain forward."""
    x, y = loader[0]
    with torch.no_grad():
        return int((copy.deepcopy(model).eval()(x[rows]).argmax(1) == y[rows]).sum())


# --- it is set, and it travels ---


def test_harden_sets_it_and_it_travels(hardened: nn.Module, tmp_path: Path) -> None:
    known = hardened.quantguard
    assert known.threat == OWN and known.num_classes == 10 and known.input_shape == (1, 8, 8)
    assert known.class_names == tuple("0123456789")  # through a Subset
    qg.save(hardened, tmp_path / "m.qg")
    loaded = qg.load(tmp_path / "m.qg")
    twins = [loaded, copy.deepcopy(hardened), pickle.loads(pickle.dumps(hardened)),
             nn.DataParallel(hardened), qg.restore(hardened),
             qg.convert(qg.restore(hardened), 3), torch.compile(hardened, backend="eager")]
    for twin in twins:
        assert vars(metadata_of(twin)).items() >= {
            "threat": OWN, "num_classes": 10, "class_names": known.class_names,
            "input_shape": (1, 8, 8)}.items()
    assert loaded.quantguard == known and loaded.quantguard.plan == known.plan


@pytest.mark.parametrize("recipe", ["clean", "nfgsm"])
def test_a_float_control_has_it_too(recipe: str, normalised: nn.Module, tmp_path: Path,
                                    loader: list[Digits]) -> None:
    few = [(loader[0][0][:64], loader[0][1][:64])] * 2
    with pytest.warns(UserWarning, match="held out"):
        made = qg.harden(normalised, few, OWN, bits=32, epochs=1, progress=False,
                         recipe=qg.Recipe(recipe, input_bits=0))
    assert made.quantguard.threat == OWN and made.quantguard.num_classes == 10
    assert made.quantguard.class_names is None and not hasattr(normalised, "quantguard")
    qg.save(made, tmp_path / "m.qg")
    torch.save(made, tmp_path / "m.pt")
    for path in ("m.qg", "m.pt"):  # the latter without --trust
        assert open_model(str(tmp_path / path)).quantguard == made.quantguard
    assert type(qg.convert(made).quantguard).__name__ == "Conversion"
    assert qg.convert(made).quantguard.threat == OWN


def test_convert_takes_what_is_known(normalised: nn.Module) -> None:
    plain = qg.convert(normalised)
    assert plain.quantguard.threat is None and metadata_of(plain).num_classes is None
    assert qg.convert(normalised, threat=OWN).quantguard.threat == OWN
    with pytest.raises(SpecError, match="must be a quantguard.Threat"):
        qg.convert(normalised, threat=0.1)  # type: ignore[arg-type]


def test_files_of_the_first_versions_and_damaged_ones(hardened: nn.Module, tmp_path: Path) -> None:
    qg.save(hardened, tmp_path / "m.qg")

    def written(change: Callable[[dict[str, Any]], object]) -> Path:
        target = tmp_path / "changed.qg"
        with zipfile.ZipFile(tmp_path / "m.qg") as old, zipfile.ZipFile(target, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                if name == "manifest.json":
                    manifest = json.loads(content)
                    change(manifest)
                    content = json.dumps(manifest).encode()
                new.writestr(name, content)
        return target

    old = qg.load(written(lambda m: m.pop("metadata")))
    assert old.quantguard.threat is None and old.quantguard.plan == hardened.quantguard.plan
    for wrong in ({"threat": {"eps": -1}}, {"threat": {"nonsense": 1}}, {"input_shape": "abc"},
                  {"num_classes": "x"}, [1]):
        with pytest.raises(LoadError, match="is damaged"):
            qg.load(written(lambda m, wrong=wrong: m.update(metadata=wrong)))
    bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    annotate(bare, input_shape=5)
    torch.save(bare, tmp_path / "m.pt")
    with pytest.raises(LoadError, match="is no metadata"):
        open_model(str(tmp_path / "m.pt"))


# --- Python: without a threat the model's own counts ---


def test_without_a_threat_the_model_s_own_counts(hardened: nn.Module, loader: list[Digits],
                                                 capfd: pytest.CaptureFixture[str]) -> None:
    own = qg.evaluate(hardened, loader, **{**QUICK, "progress": True})
    assert "the model's own: Linf, eps 0.05" in capfd.readouterr().err
    given = qg.evaluate(hardened, loader, OWN, **{**QUICK, "progress": True})
    assert "threat:" not in capfd.readouterr().err
    assert own.threat == given.threat == OWN
    assert np.array_equal(own.survived, given.survived)
    assert int(own.correct.sum()) == right(hardened, loader, slice(40))
    assert f"mean {MEAN}, std {STD}" in str(own)
    proof = qg.certify(hardened, loader, images=4, method="ibp", progress=False)
    assert proof.threat == OWN
    both = qg.compare({"float": qg.restore(hardened), "low": hardened}, loader, **QUICK)
    assert {row.threat for row in both.rows.values()} == {OWN}


def test_another_radius_is_the_user_s_right_and_told(hardened: nn.Module, loader: list[Digits],
                                                     capfd: pytest.CaptureFixture[str]) -> None:
    one = qg.evaluate(hardened, loader, qg.Threat(eps=0.02), **{**QUICK, "progress": True})
    assert one.threat == dataclasses.replace(OWN, eps=0.02)
    said = capfd.readouterr().err
    assert "another than the model's own" in said and "mean 0.3" in said
    assert int(one.correct.sum()) == right(hardened, loader, slice(40))
    two = qg.evaluate(hardened, loader, qg.Threat("l2", 0.2, mean=MEAN, std=STD), **QUICK)
    assert two.threat.norm == "l2"
    # the same normalisation, spelled in other pixels, or for each channel
    same = qg.Threat(eps=0.05 * 255, bounds=(0, 255), mean=MEAN * 255, std=STD * 255)
    assert qg.evaluate(hardened, loader, same, **QUICK).correct.sum() == one.correct.sum()


@pytest.mark.parametrize("threat", [
    qg.Threat(mean=0.5, std=0.4), qg.Threat(mean=0.3, std=0.5), qg.Threat(mean=0.0, std=1.0),
    qg.Threat(bounds=(0, 255)), qg.Threat(mean=(0.3,) * 3, std=(0.4, 0.4, 0.5)),
    qg.Threat(mean=0.3, std=0.4, bounds=(-1, 1))])
@pytest.mark.parametrize("verb", [
    lambda m, x, t: qg.evaluate(m, x, t, **QUICK),
    lambda m, x, t: qg.certify(m, x, t, progress=False),
    lambda m, x, t: qg.harden(m, x, t, progress=False),
    lambda m, x, t: qg.sensitivity(m, x, t, progress=False),
    lambda m, x, t: qg.compare({"a": m}, x, t, progress=False),
    lambda m, x, t: qg.ablate(qg.restore(m), x, x, t, progress=False)],
    ids=["evaluate", "certify", "harden", "sensitivity", "compare", "ablate"])
def test_another_normalisation_is_refused(threat: qg.Threat, verb: Any, hardened: nn.Module,
                                          loader: list[Digits]) -> None:
    with pytest.raises(SpecError, match="the model's input was made for"):
        verb(hardened, loader, threat)


def test_a_model_around_another_has_an_input_of_its_own(hardened: nn.Module, digits: Digits,
                                                        loader: list[Digits]) -> None:
    class Normalise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - MEAN) / STD

    whole = nn.Sequential(Normalise(), hardened)
    result = qg.evaluate(whole, [digits], qg.Threat(eps=0.02), **QUICK)
    assert int(result.correct.sum()) == right(hardened, loader, slice(40))


def test_compare_of_models_that_cannot_share_a_loader(hardened: nn.Module, quantized: nn.Module,
                                                      loader: list[Digits]) -> None:
    raw = annotate(copy.deepcopy(quantized), threat=qg.Threat(eps=0.05))
    with pytest.raises(SpecError, match=r"a was made for .*mean 0.3.*, and b for .*no mean"):
        qg.compare({"a": hardened, "b": raw}, loader, **QUICK)
    wide = annotate(copy.deepcopy(hardened), threat=dataclasses.replace(OWN, eps=0.1))
    with pytest.raises(SpecError, match="Give a threat"):
        qg.compare({"a": hardened, "b": wide}, loader, **QUICK)
    found = qg.compare({"a": hardened, "b": wide}, loader, qg.Threat(eps=0.02), **QUICK)
    assert {row.threat.mean for row in found.rows.values()} == {(MEAN,)}


def test_images_and_classes_of_another_kind(hardened: nn.Module, loader: list[Digits]) -> None:
    x, y = loader[0]
    for call in (lambda data: qg.evaluate(hardened, data, **QUICK),
                 lambda data: qg.certify(hardened, data, progress=False),
                 lambda data: qg.harden(hardened, data, progress=False)):
        with pytest.raises(DataError, match=r"1x6x6, and the model was hardened on 1x8x8"):
            call([(x[:20, :, 1:7, 1:7], y[:20])])

    def named(*names: str, labels: Tensor = y[:20]) -> DataLoader[Any]:
        data: Any = TensorDataset(x[:20], labels)
        data.classes = list(names)
        return DataLoader(data, batch_size=20)

    with pytest.raises(DataError, match="3 classes, and the model was hardened on 10"):
        qg.evaluate(hardened, named("a", "b", "c", labels=y[:20] % 3), **QUICK)
    with pytest.raises(DataError, match="class '0' has the number 1 in the data, and 0"):
        qg.certify(hardened, named(*"1023456789"), progress=False)
    qg.evaluate(hardened, named(*"0123456789"), **QUICK)
    qg.evaluate(hardened, named(*"abcdefghij"), **QUICK)  # other names for them
    # a head of another size, put on since: the metadata is what is old
    other = copy.deepcopy(hardened)
    other[13] = nn.Linear(64, 3)
    qg.evaluate(other, named("a", "b", "c", labels=y[:20] % 3), **QUICK)
    assert class_names_of([(x, y)]) is None and class_names_of(load_data("digits", "test"))


# --- the command line ---


def test_the_readme_s_next_line_is_right(here: Path, loader: list[Digits]) -> None:
    """What read 43.3 where 78.9 is true: hardened with mean and std, evaluated without."""
    succeeds("harden", "net.pt", "--data", "digits", "--mean", MEAN, "--std", STD, "--eps", "0.05",
             *TRAIN, "--quiet")
    text = succeeds("evaluate", "net.hardened.qg", "--data", "digits", "--eps", "0.05", "--images",
                    "60", "--suite", "quick", "--quiet", "--json", "r.json")
    told = json.loads(Path("r.json").read_text())
    assert told["threat"]["mean"] == [MEAN] and told["threat"]["std"] == [STD]
    model = qg.load("net.hardened.qg")
    assert told["clean"] == right(model, loader, told["sample"]["indices"]) > 48
    assert "note: net.hardened.qg is for Linf, eps 0.05 in pixels of 0..1, mean 0.3, std 0.4; " \
        "10 classes; input 1x8x8; used here, too" in text
    # eps, too, where none is given; another one is told
    for more, eps in (((), 0.05), (("--eps", "0.02"), 0.02)):
        text = succeeds("certify", "net.hardened.qg", "--data", "digits", *more, "--images", "3",
                        "--method", "ibp", "--quiet", "--json", "c.json")
        assert json.loads(Path("c.json").read_text())["threat"]["eps"] == eps
        assert ("used here: Linf, eps 0.02" in text) == bool(more)
    text = succeeds("inspect", "net.hardened.qg", "--json", "i.json")
    assert "made for: Linf, eps 0.05 in pixels of 0..1, mean 0.3, std 0.4" in text
    assert json.loads(Path("i.json").read_text())["metadata"]["num_classes"] == 10


@pytest.mark.parametrize(("options", "said"), [
    (("--mean", "0.5"), "mean 0.5"), (("--std", "0.2"), "std 0.2"), (("--size", "9"), "--size 9")])
@pytest.mark.parametrize("verb", ["evaluate", "certify", "compare", "harden", "sensitivity",
                                  "ablate", "convert"])
def test_every_verb_refuses_what_contradicts(verb: str, options: tuple[str, ...], said: str,
                                             here: Path) -> None:
    if verb in ("ablate", "convert"):  # these take a float model
        qg.save(qg.restore(qg.load("net.qg")), "net.qg")
    output = ("-o", "out.qg") if verb in ("convert", "harden") else ()
    assert said in fails(verb, "net.qg", "--data", "digits", *options, *output)
    assert not Path("out.qg").exists()


def test_convert_on_the_command_line(here: Path) -> None:
    succeeds("convert", "net.pt", "--mean", MEAN, "--std", STD, "--quiet", "-o", "a.qg")
    assert qg.load("a.qg").quantguard.threat == qg.Threat(mean=MEAN, std=STD)
    succeeds("convert", "net.pt", "--quiet", "-o", "b.qg")
    assert qg.load("b.qg").quantguard.threat is None
    text = succeeds("compare", "a.qg", "net.pt", "--data", "digits", "--eps", "0.02", "--images",
                    "9", "--suite", "quick", "--quiet", "--json", "c.json")
    rows = json.loads(Path("c.json").read_text())["rows"].values()
    assert [row["threat"]["mean"] for row in rows] == [[MEAN]] * 2 and "note: a.qg" in text
    qg.save(annotate(qg.load("b.qg"), threat=qg.Threat(eps=0.02)), "b.qg")
    assert "One loader feeds all" in fails("compare", "a.qg", "b.qg", "--data", "digits")


def test_a_model_for_0_to_255_reads_the_same_images(here: Path, cnn: nn.Module,
                                                    digits: Digits) -> None:
    """Hardened in Python on pixels up to 255; the command line's are shares of that."""
    x, y = (digits[0] * 255).round(), digits[1]
    net = copy.deepcopy(cnn)
    with torch.no_grad():
        net[0].weight.div_(255)  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="held out"):
        made = qg.harden(net, [(x[:64], y[:64])], qg.Threat(eps=8, bounds=(0, 255)), epochs=1,
                         progress=False, recipe=qg.Recipe("nfgsm", lr=1e-4))
    qg.save(made, "wide.qg")
    text = succeeds("evaluate", "wide.qg", "--data", "digits", "--images", "60", "--suite", "quick",
                    "--quiet", "--json", "r.json")
    told = json.loads(Path("r.json").read_text())
    assert told["threat"]["eps"] == pytest.approx(8 / 255) and told["threat"]["bounds"] == [0, 1]
    with torch.no_grad():
        answers = made(digits[0][told["sample"]["indices"]] * 255).argmax(1)
    assert told["clean"] == int((answers == y[told["sample"]["indices"]]).sum()) > 48
    assert "eps 8 in pixels of 0..255 (8 of 255 grey levels)" in text


def test_the_size_and_the_classes_of_a_folder(here: Path, digits: Digits) -> None:
    def write(name: str, side: int, classes: int) -> str:
        for part in ("train", "val"):
            for number in range(60):
                label = int(digits[1][number])
                if label < classes:
                    path = here / name / part / f"class{label}" / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    pixels = (digits[0][number, 0] * 255).round().byte().numpy()
                    Image.fromarray(pixels, "L").resize((side, side)).save(path)
        return f"imagefolder:{name}"

    large, few = write("large", 24, 10), write("few", 8, 3)
    succeeds("harden", "net.pt", "--data", large, "--size", "8", *TRAIN, "--quiet", "--eps", "0.05",
             "-o", "f.qg")
    known = qg.load("f.qg").quantguard
    assert known.input_shape == (1, 8, 8) and known.class_names[3] == "class3"
    measure = ("evaluate", "f.qg", "--suite", "quick", "--quiet", "--images", "9", "--data")
    assert "Robust accuracy" in succeeds(*measure, large)  # without --size
    assert "3 classes, and the model was hardened on 10" in fails(*measure, few)
