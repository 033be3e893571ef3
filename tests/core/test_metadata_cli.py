"""The command line uses the metadata of a model, and refuses options that contradict it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from normalised_digits import MEAN, STD, TRAIN, Digits, fails, right, succeeds
from PIL import Image
from torch import nn

import quantguard as qg
from quantguard.core.metadata import annotate

pytestmark = pytest.mark.usefixtures("tiny_suite")


def test_evaluate_uses_the_normalisation_of_harden(here: Path, loader: list[Digits]) -> None:
    """Without it, the accuracy in the README was 43.3 and not 78.9."""
    succeeds("harden", "net.pt", "--data", "digits", "--mean", MEAN, "--std", STD, "--eps", "0.05",
             *TRAIN, "--quiet")
    text = succeeds("evaluate", "net.hardened.qg", "--data", "digits", "--eps", "0.05", "--images",
                    "60", "--suite", "quick", "--quiet", "--json", "r.json")
    result = json.loads(Path("r.json").read_text())
    assert result["threat"]["mean"] == [MEAN] and result["threat"]["std"] == [STD]
    model = qg.load("net.hardened.qg")
    assert result["clean"] == right(model, loader, result["sample"]["indices"]) > 48
    assert "note: net.hardened.qg is for Linf, eps 0.05 in pixels of 0..1, mean 0.3, std 0.4; " \
        "10 classes; input 1x8x8; used here, too" in text
    # eps as well by default; another one is logged
    for more, eps in (((), 0.05), (("--eps", "0.02"), 0.02)):
        text = succeeds("certify", "net.hardened.qg", "--data", "digits", *more, "--images", "3",
                        "--method", "ibp", "--quiet", "--json", "c.json")
        assert json.loads(Path("c.json").read_text())["threat"]["eps"] == eps
        assert ("used here: Linf, eps 0.02" in text) == bool(more)
    text = succeeds("inspect", "net.hardened.qg", "--json", "i.json")
    assert "made for: Linf, eps 0.05 in pixels of 0..1, mean 0.3, std 0.4" in text
    assert json.loads(Path("i.json").read_text())["metadata"]["num_classes"] == 10


@pytest.mark.parametrize(("options", "message"), [
    (("--mean", "0.5"), "mean 0.5"), (("--std", "0.2"), "std 0.2"), (("--size", "9"), "--size 9")])
@pytest.mark.parametrize("verb", ["evaluate", "certify", "compare", "harden", "sensitivity",
                                  "ablate", "convert"])
def test_every_verb_refuses_contradicting_options(verb: str, options: tuple[str, ...], message: str,
                                             here: Path) -> None:
    if verb in ("ablate", "convert"):  # these take a float model
        qg.save(qg.restore(qg.load("net.qg")), "net.qg")
    output = ("-o", "out.qg") if verb in ("convert", "harden") else ()
    assert message in fails(verb, "net.qg", "--data", "digits", *options, *output)
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
    """It was hardened in Python on pixels of 0..255; the command line has pixels of 0..1."""
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
    result = json.loads(Path("r.json").read_text())
    assert result["threat"]["eps"] == pytest.approx(8 / 255)
    assert result["threat"]["bounds"] == [0, 1]
    with torch.no_grad():
        answers = made(digits[0][result["sample"]["indices"]] * 255).argmax(1)
    assert result["clean"] == int((answers == y[result["sample"]["indices"]]).sum()) > 48
    assert "eps 8 in pixels of 0..255 (8 of 255 grey levels)" in text


def test_the_size_and_the_classes_of_a_folder(here: Path, digits: Digits) -> None:
    def write(name: str, side: int, classes: int) -> str:
        for split in ("train", "val"):
            for number in range(60):
                label = int(digits[1][number])
                if label < classes:
                    path = here / name / split / f"class{label}" / f"{number}.png"
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
