"""``--images N`` is a random sample of a split in any order; Python warns about sorted data."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.attacks import PGD, suites
from quantguard.certification.certificate import Certificate
from quantguard.cli.main import main
from quantguard.conversion import converter as conversion
from quantguard.core.errors import DataError
from quantguard.data.loader import load_data, to_measure
from quantguard.evaluation.results import Evaluation

Digits = tuple[Tensor, Tensor]
QUICK: dict[str, Any] = {"suite": [PGD("ce", 2)], "progress": False}


@pytest.fixture(autouse=True)
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites._SUITES, "quick", (2, 2, 8))
    monkeypatch.setattr(suites, "MODES", ("sigmoid(8)",))
    monkeypatch.setattr(suites, "SHARPNESSES", suites.SHARPNESSES[:1])


@pytest.fixture
def folder(tmp_path: Path, digits: Digits, train_digits: TensorDataset, cnn: nn.Module,
           monkeypatch: pytest.MonkeyPatch) -> Path:
    """Real digits as an image folder, sorted by class, and the CNN as net.pt."""
    monkeypatch.chdir(tmp_path)
    for part, (x, y) in (("val", digits), ("train", (train_digits.tensors[0][:300],
                                                     train_digits.tensors[1][:300]))):
        for number, (image, label) in enumerate(zip(x, y, strict=True)):
            path = tmp_path / "sorted" / part / str(int(label)) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image[0] * 255).round().byte().numpy(), "L").save(path)
    torch.save(cnn, "net.pt")
    return tmp_path


def succeeds(*arguments: Any) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output or repr(result.exception)
    return result.output


def ran(verb: str, *arguments: Any) -> dict[str, Any]:
    models = ("net.pt", "net.qg") if verb == "compare" else \
        ("net.qg",) if verb == "sensitivity" else ("net.pt",)
    suite = () if verb == "certify" else ("--suite", "quick")
    if verb in ("evaluate", "compare") and "--seed" not in arguments:
        suite = (*suite, "--budget", "0.001s")  # only the choice of images matters here
    succeeds(verb, *models, "--data", "imagefolder:sorted", "--eps", "0.02", *suite, "--quiet",
             "--json", f"{verb}.json", *arguments)
    result: dict[str, Any] = json.loads(Path(f"{verb}.json").read_text())
    return result


def test_a_few_images_of_a_sorted_folder_are_of_all_classes(folder: Path) -> None:
    result = ran("evaluate", "--images", "50")
    counts = np.bincount(result["labels"], minlength=10)
    assert counts.sum() == 50 and (counts > 0).all(), counts
    sample = result["sample"]
    assert sample["of"] == 500 and sample["seed"] == 0 and len(set(sample["indices"])) == 50
    # An independent oracle: the labels of torchvision's folder at these indices.
    import torchvision.datasets
    found = torchvision.datasets.ImageFolder("sorted/val").targets
    assert [found[i] for i in sample["indices"]] == result["labels"]
    assert "a seeded sample of 500" in str(Evaluation.load("evaluate.json"))
    first = ran("evaluate", "--images", "30", "--first")
    assert set(first["labels"]) == {0} and first["sample"]["seed"] is None
    assert first["sample"]["indices"] == list(range(30))
    assert "the first of 500" in str(Evaluation.load("evaluate.json"))


def test_every_verb_model_and_seed_gets_the_same_images(folder: Path) -> None:
    succeeds("convert", "net.pt", "--quiet", "--bits", "32", "--bits", "first=2")
    one = ran("evaluate", "--images", "20")
    again = ran("evaluate", "--images", "20", "--seed", "7", "--batch-size", "3", "--budget", "1s")
    assert one["image_hash"] == again["image_hash"] and one["sample"] == again["sample"]
    assert ran("certify", "--images", "20", "--method", "ibp")["sample"] == one["sample"]
    assert Certificate.load("certify.json").sample == one["sample"]
    assert "a seeded sample of 500" in str(Certificate.load("certify.json"))
    compared = ran("compare", "--images", "20")
    assert {row["image_hash"] for row in compared["rows"].values()} == {one["image_hash"]}
    costs = ran("sensitivity", "--images", "4", "--split", "test")
    assert costs["whole"]["sample"]["indices"] == one["sample"]["indices"][:4]
    more = ran("evaluate", "--images", "40")
    assert more["sample"]["indices"][:20] == one["sample"]["indices"]
    # The same holds for training images, which were once drawn by the attacks' seed.
    train = [ran(verb, "--images", "20", "--split", "train", *seed) for verb, seed in (
        ("evaluate", ("--seed", "1", "--budget", "1s")), ("evaluate", ()),
        ("certify", ("--method", "ibp")))]
    assert len({row["image_hash"] for row in train}) == 1
    assert len(set(train[0].get("labels", ()))) > 5


@pytest.mark.slow
def test_ablate_measures_on_the_sample(folder: Path) -> None:
    result = ran("ablate", "--images", "20", "--epochs", "1", "--set", "steps=1",
                 "--set", "lr=1e-3")
    one = ran("evaluate", "--images", "20")
    assert {row["image_hash"] for row in result["rows"].values()} == {one["image_hash"]}


def test_all_images_come_in_order_and_a_smaller_number_is_reported(folder: Path) -> None:
    loader = load_data("imagefolder:sorted", "test")
    assert to_measure(loader, 500).dataset is loader.dataset
    assert to_measure(loader, None).dataset is loader.dataset
    text = succeeds("certify", "net.pt", "--data", "imagefolder:sorted", "--images", "501",
                    "--method", "ibp", "--quiet")
    assert "note: --images 501, and imagefolder:sorted has 500" in text
    assert "sample" not in text


def test_a_replay_takes_the_images_that_were_recorded(folder: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    one = ran("evaluate", "--images", "20", "--seed", "3")
    Path("one.json").write_text(json.dumps(one))
    monkeypatch.setattr("quantguard.data.loader.SAMPLING_SEED", 5)  # as a later version may
    succeeds("evaluate", "net.pt", "--data", "imagefolder:sorted", "--replay", "one.json",
             "--quiet", "--json", "two.json")
    two = json.loads(Path("two.json").read_text())
    assert two["sample"] == one["sample"] and two["survived_images"] == one["survived_images"]
    # A result from before samples were recorded is of the first images.
    first = ran("evaluate", "--images", "20", "--first")
    del first["sample"]
    Path("old.json").write_text(json.dumps(first))
    succeeds("evaluate", "net.pt", "--data", "imagefolder:sorted", "--replay", "old.json",
             "--quiet", "--json", "two.json")
    assert json.loads(Path("two.json").read_text())["survived_images"] == first["survived_images"]


@pytest.mark.parametrize("sample", [{"of": 7, "indices": [0], "seed": 0}, {"of": 500}, {},
                                    {"of": 500, "indices": [500], "seed": 0},
                                    {"of": 500, "indices": ["a"], "seed": 0}])
def test_a_sample_of_other_data_is_refused(sample: dict[str, Any]) -> None:
    loader = load_data("digits", "test")
    if sample == {"of": 500}:
        sample = {"of": 499, "indices": []}
    with pytest.raises(DataError, match="this one has 500"):
        to_measure(loader, again=sample)


# --- Python: a loader is read in its order ---


def in_order(digits: Digits) -> DataLoader[Any]:
    x, y = digits
    order = y.argsort(stable=True)
    return DataLoader(TensorDataset(x[order], y[order]), batch_size=50)


@pytest.mark.parametrize("measure", [
    lambda model, loader, n: qg.evaluate(model, loader, images=n, **QUICK),
    lambda model, loader, n: qg.certify(model, loader, images=n, method="ibp", progress=False),
    lambda model, loader, n: qg.compare({"a": model}, loader, images=n, **QUICK),
    lambda model, loader, n: qg.evaluate(model, loader, images=n, certify=True, **QUICK)],
    ids=["evaluate", "certify", "compare", "evaluate-certify"])
@pytest.mark.parametrize(("n", "said"), [(20, "are of class 0"), (120, "3 of the model's 10")])
def test_the_first_of_sorted_data_warn_once(measure: Any, n: int, said: str, cnn: nn.Module,
                                            digits: Digits) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        measure(cnn, in_order(digits), n)
    assert [said in str(w.message) for w in caught] == [True]


def test_shuffled_few_and_whole_loaders_do_not_warn(cnn: nn.Module, digits: Digits) -> None:
    x, y = digits
    for loader, n in (([(x, y)], 20), ([(x, y)], 3), (in_order(digits), 2),
                      ([(x[y == 4], y[y == 4])], None), (in_order(digits), 500),
                      ([(x[y == 4][:20], y[y == 4][:20])], 20)):
        qg.evaluate(cnn, loader, images=n, **QUICK)  # warnings are errors here


def test_calibration_reads_images_of_all_classes(digits: Digits, cnn: nn.Module,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 16 batches of sorted data are of two or three classes."""
    x, y = digits
    order = y.argsort(stable=True)
    x, y = x[order], y[order]
    seen: list[Tensor] = []
    inner = conversion.calibrate

    def spy(model: Any, sites: Any, batches: Any, example: Any) -> None:
        seen.append(torch.cat(batches))
        inner(model, sites, batches, example)

    monkeypatch.setattr(conversion, "calibrate", spy)
    batches = [(x[i:i + 5], y[i:i + 5]) for i in range(0, 500, 5)]
    known = {image.numpy().tobytes(): int(label) for image, label in zip(x, y, strict=True)}
    for data in (DataLoader(TensorDataset(x, y), batch_size=5), batches,
                 DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)):
        seen.clear()
        qg.convert(cnn, data=data)
        classes = {known[image.numpy().tobytes()] for image in seen[0]}
        assert len(seen[0]) == 80 and len(classes) >= 9, classes
