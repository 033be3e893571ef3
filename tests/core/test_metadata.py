"""The metadata of a model (threat, classes, size) is saved with it and used by every function."""

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
from normalised_digits import MEAN, OWN, QUICK, STD, Digits, right
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.conversion.checkpoint import open_model
from quantguard.core.errors import DataError, LoadError, SpecError
from quantguard.core.metadata import annotate, class_names_of, metadata_of
from quantguard.data.loader import load_data

pytestmark = pytest.mark.usefixtures("tiny_suite")


def test_copies_and_files_include_the_metadata_of_harden(hardened: nn.Module,
                                                         tmp_path: Path) -> None:
    known = hardened.quantguard
    assert known.threat == OWN and known.num_classes == 10 and known.input_shape == (1, 8, 8)
    assert known.class_names == tuple("0123456789")  # through a Subset
    qg.save(hardened, tmp_path / "m.qg")
    loaded = qg.load(tmp_path / "m.qg")
    copies = [loaded, copy.deepcopy(hardened), pickle.loads(pickle.dumps(hardened)),
              nn.DataParallel(hardened), qg.restore(hardened),
              qg.convert(qg.restore(hardened), 3), torch.compile(hardened, backend="eager")]
    for clone in copies:
        assert vars(metadata_of(clone)).items() >= {
            "threat": OWN, "num_classes": 10, "class_names": known.class_names,
            "input_shape": (1, 8, 8)}.items()
    assert loaded.quantguard == known and loaded.quantguard.plan == known.plan


@pytest.mark.parametrize("recipe", ["clean", "nfgsm"])
def test_a_float_model_has_metadata_too(recipe: str, normalised: nn.Module, tmp_path: Path,
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


def test_convert_sets_the_threat_it_gets(normalised: nn.Module) -> None:
    plain = qg.convert(normalised)
    assert plain.quantguard.threat is None and metadata_of(plain).num_classes is None
    assert qg.convert(normalised, threat=OWN).quantguard.threat == OWN
    with pytest.raises(SpecError, match="must be a quantguard.Threat"):
        qg.convert(normalised, threat=0.1)  # type: ignore[arg-type]


def test_files_without_metadata_and_damaged_ones(hardened: nn.Module, tmp_path: Path) -> None:
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


def test_without_a_threat_the_model_s_own_is_used(hardened: nn.Module, loader: list[Digits],
                                                 capfd: pytest.CaptureFixture[str]) -> None:
    own = qg.evaluate(hardened, loader, **{**QUICK, "progress": True})
    assert "the model's own: Linf, eps 0.05" in capfd.readouterr().err
    passed = qg.evaluate(hardened, loader, OWN, **{**QUICK, "progress": True})
    assert "threat:" not in capfd.readouterr().err
    assert own.threat == passed.threat == OWN
    assert np.array_equal(own.survived, passed.survived)
    assert int(own.correct.sum()) == right(hardened, loader, slice(40))
    assert f"mean {MEAN}, std {STD}" in str(own)
    proof = qg.certify(hardened, loader, images=4, method="ibp", progress=False)
    assert proof.threat == OWN
    both = qg.compare({"float": qg.restore(hardened), "low": hardened}, loader, **QUICK)
    assert {row.threat for row in both.rows.values()} == {OWN}


def test_another_radius_is_used_and_logged(hardened: nn.Module, loader: list[Digits],
                                                     capfd: pytest.CaptureFixture[str]) -> None:
    one = qg.evaluate(hardened, loader, qg.Threat(eps=0.02), **{**QUICK, "progress": True})
    assert one.threat == dataclasses.replace(OWN, eps=0.02)
    log = capfd.readouterr().err
    assert "another than the model's own" in log and "mean 0.3" in log
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


def test_a_wrapper_has_its_own_input(hardened: nn.Module, digits: Digits,
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
    with pytest.raises(SpecError, match="Pass a threat"):
        qg.compare({"a": hardened, "b": wide}, loader, **QUICK)
    found = qg.compare({"a": hardened, "b": wide}, loader, qg.Threat(eps=0.02), **QUICK)
    assert {row.threat.mean for row in found.rows.values()} == {(MEAN,)}


def test_images_of_another_size_or_class(hardened: nn.Module, loader: list[Digits]) -> None:
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
    qg.evaluate(hardened, named(*"abcdefghij"), **QUICK)  # other names of the same number
    # with a new head of another size, the metadata is outdated
    other = copy.deepcopy(hardened)
    other[13] = nn.Linear(64, 3)
    qg.evaluate(other, named("a", "b", "c", labels=y[:20] % 3), **QUICK)
    assert class_names_of([(x, y)]) is None and class_names_of(load_data("digits", "test"))
