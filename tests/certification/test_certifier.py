"""The function `certify`: its result, run directory, command line and errors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import quantguard as qg
from quantguard.certification import image_bounds
from quantguard.certification.certificate import Certificate
from quantguard.data.loader import load_data


def test_no_certified_image_is_broken(digits_model: Any, untouched: Any) -> None:
    model, loader = digits_model
    threat = qg.Threat(eps=0.02)
    with untouched(model):
        certificate = qg.certify(model, loader, threat, progress=False)
    evaluation = qg.evaluate(model, loader, threat, suite="quick", progress=False)
    assert 10 < certificate.certified.sum() < certificate.correct.sum()
    assert (certificate.certified <= evaluation.survived).all()
    assert (certificate.correct == evaluation.correct).all()
    assert certificate.image_hash == evaluation.image_hash
    wider = qg.certify(model, loader, qg.Threat(eps=0.03), progress=False)
    assert (wider.certified <= certificate.certified).all() and (wider.lower
                                                                 <= certificate.lower).all()


def test_methods_agree_where_they_should(digits_model: Any) -> None:
    model, loader = digits_model
    by = {method: qg.certify(model, loader, qg.Threat(eps=0.02), method=method, progress=False)
          for method in ("ibp", "crown", "auto")}
    assert (by["crown"].lower >= by["ibp"].lower).all()
    assert (by["auto"].certified == by["crown"].certified).all()
    assert by["crown"].certified.sum() >= by["ibp"].certified.sum()
    (share,) = by["ibp"].sites.values()
    assert list(by["ibp"].sites) == ["2"] and 0 < share < 1
    at_rest = qg.certify(model, loader, qg.Threat(eps=0), method="ibp", progress=False)
    assert at_rest.sites["2"] > 0.99 and (at_rest.certified == at_rest.correct).all()


def test_a_certificate_prints_and_survives_saving(digits_model: Any, tmp_path: Path) -> None:
    model, loader = digits_model
    result = qg.certify(model, loader, qg.Threat("l2", 0.1), images=50, progress=False)
    assert result.images == 50 and "Robust accuracy >= " in str(result)
    assert "intervals on one level" in str(result) and "L2, eps 0.1" in str(result)
    assert "<pre>" in result._repr_html_()
    low, high = result.interval
    assert low <= result.certified_accuracy <= high and result.clean_accuracy > 0.8
    result.save(tmp_path / "c.json")
    again = Certificate.load(tmp_path / "c.json")
    assert again.to_dict() == result.to_dict() and (again.lower == result.lower).all()
    assert again.threat == result.threat and (again.certified == result.certified).all()
    with pytest.raises(qg.DataError, match="not a certificate JSON"):
        Certificate.from_dict({"format": 1})
    with pytest.raises(qg.DataError, match="cannot be read"):
        Certificate.load(tmp_path / "none.json")


def test_a_run_directory_resumes(
        digits_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loader = digits_model
    whole = qg.certify(model, loader, qg.Threat(eps=0.02), progress=False)
    count, real = 0, image_bounds.margins

    def interrupted(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(image_bounds, "margins", interrupted)
    monkeypatch.setattr(image_bounds, "_BATCHES", 1)
    with pytest.raises(KeyboardInterrupt, match="interrupted after 64 of 100"):
        qg.certify(model, loader, qg.Threat(eps=0.02), run_dir=tmp_path, progress=False)
    again = qg.certify(model, loader, qg.Threat(eps=0.02), run_dir=tmp_path, progress=False)
    assert (again.lower == whole.lower).all() and again.sites == whole.sites
    before = count
    assert (qg.certify(model, loader, qg.Threat(eps=0.02), run_dir=tmp_path,
                       progress=False).lower == whole.lower).all()
    assert count == before
    with pytest.raises(qg.SpecError, match="other settings"):
        qg.certify(model, loader, qg.Threat(eps=0.03), run_dir=tmp_path, progress=False)


def test_images_left_out_for_lack_of_time_are_not_certified(digits_model: Any,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_bounds, "_BATCHES", 1)
    model, loader = digits_model
    result = qg.certify(model, loader, qg.Threat(eps=0), budget="0.001s", progress=False)
    assert result.skipped == 100 - (result.lower > -np.inf).sum() > 0
    assert "left out for lack of time" in str(result)
    assert not result.certified[~np.isfinite(result.lower)].any()
    assert None in json.loads(json.dumps(result.to_dict()))["lower"]


def test_on_the_command_line(digits_model: Any, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from quantguard.cli.main import main
    qg.save(digits_model[0], tmp_path / "model.qg")
    arguments = ["certify", str(tmp_path / "model.qg"), "--trust", "--data", "digits", "--eps",
                 "0.02", "--images", "100", "--json", str(tmp_path / "c.json"), "--quiet"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and "Robust accuracy >= " in result.output, result.output
    cut = CliRunner().invoke(main, [*arguments[:-1], "--splits", "2"])
    assert cut.exit_code == 0 and "Robust accuracy >= " in cut.output, cut.output
    saved = Certificate.load(tmp_path / "c.json")
    images = Subset(load_data("digits", "test").dataset, saved.sample["indices"])
    again = qg.certify(digits_model[0], DataLoader(images, batch_size=64), qg.Threat(eps=0.02),
                       progress=False)
    assert (saved.certified == again.certified).all()
    result = CliRunner().invoke(main, [*arguments, "--method", "best"])
    assert result.exit_code == 1 and "Error: method='best' is unknown" in result.output


def test_wrong_settings_and_data_are_named(digits_model: Any) -> None:
    model, loader = digits_model
    x, y = loader[0]
    with pytest.raises(qg.SpecError, match="method='best' is unknown"):
        qg.certify(model, loader, method="best")
    with pytest.raises(qg.DataError, match="has no labels"):
        qg.certify(model, [x], progress=False)
    with pytest.raises(qg.DataError, match="NaN"):
        qg.certify(model, [(x * float("nan"), y)], progress=False)
    with pytest.raises(qg.DataError, match="10 outputs"):
        qg.certify(model, [(x, y + 8)], progress=False)
    with pytest.raises(qg.ConversionError, match="softened"), qg.soften(model, 4):
        qg.certify(model, loader, progress=False)


@pytest.mark.parametrize(("settings", "words"), [
    ({"images": 1.5}, "images=1.5 must be a whole number"), ({"images": 0}, "at least 1"),
    ({"images": "9"}, "images='9' must be"), ({"splits": "20"}, "splits='20' in linf"),
    ({"splits": 1.5}, "splits=1.5"), ({"splits": None}, "splits=None")])
def test_invalid_numbers_are_refused_before_any_work(settings: Any, words: str) -> None:
    with pytest.raises(qg.SpecError, match=words):
        qg.certify(nn.Linear(2, 2), [(None, None)], **settings)  # type: ignore[list-item]


def test_batches_that_differ_are_named() -> None:
    x, y = torch.zeros(2, 1, 6, 6), torch.zeros(2).long()
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    with pytest.raises(qg.DataError, match=r"batch 1 .* shape \(1, 5, 6\), and batch 0 \(1, 6, 6"):
        qg.certify(model, [(x, y), (x[:, :, 1:], y)], progress=False)
    with pytest.raises(qg.DataError, match="batch 2 .* images as 'pixels', and batch 0 as 'image'"):
        qg.certify(model, [{name: x, "labels": y} for name in ("image", "image", "pixels")],
                   progress=False)
    with pytest.raises(qg.DataError, match="batch 1 .* images by no name, and batch 0 as 'image'"):
        qg.certify(model, [{"image": x, "labels": y}, (x, y)], progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_precision_is_refused(dtype: torch.dtype, digits_model: Any) -> None:
    model, loader = digits_model
    with pytest.raises(qg.ConversionError, match=f"1.weight is {dtype}"):
        qg.certify(copy.deepcopy(model).to(dtype), loader, progress=False)
