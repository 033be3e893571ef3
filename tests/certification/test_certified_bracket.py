"""Evaluations with a certificate bracket the true robust accuracy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import quantguard as qg
from quantguard.certification.certificate import Certificate
from quantguard.evaluation import evaluator as evaluation


@pytest.fixture(scope="module")
def bracket(digits_model: Any) -> qg.Evaluation:
    model, loader = digits_model
    return qg.evaluate(model, loader, qg.Threat(eps=0.02), suite="quick", certify=True,
                       progress=False)


def test_the_truth_is_bracketed(digits_model: Any, bracket: qg.Evaluation, tmp_path: Path) -> None:
    model, loader = digits_model
    threat = qg.Threat(eps=0.02)
    alone = qg.certify(model, loader, threat, progress=False)
    attacked = qg.evaluate(model, loader, threat, suite="quick", progress=False)
    assert (bracket.certified == alone.certified).all() and bracket.certified.any()
    assert (bracket.survived == attacked.survived).all()
    assert bracket.bracket == (alone.certified_accuracy, attacked.robust_accuracy)
    for result in bracket.attacks:  # only attacks on all images attack proven ones
        tried = bool((result.attacked & bracket.certified).any())
        assert tried == bool(result.settings["everywhere"])
    assert [f.raised for f in bracket.flags if f.name == "certificate broken"] == [False]
    text = str(bracket)
    assert text.startswith(f"PROVEN ROBUST: Certified {100 * alone.certified_accuracy:.1f} % <= "
                           "true robust "
                           f"accuracy <= {100 * attacked.robust_accuracy:.1f} % attacked")
    assert "within one quantization level" in text
    bracket.save(tmp_path / "e.json")
    again = qg.Evaluation.load(tmp_path / "e.json")
    assert str(again) == text and (again.certified == bracket.certified).all()
    replayed = qg.evaluate(model, loader, replay=again, progress=False)
    assert replayed.bracket == bracket.bracket
    assert not attacked.certified.any() and attacked.bracket[0] == 0


def test_a_closed_bracket_is_reliable(digits_model: Any) -> None:
    model, loader = digits_model
    closed = qg.evaluate(model, loader, qg.Threat(eps=0.001), suite="quick", certify=True,
                         progress=False)
    assert (closed.certified == closed.survived).all() and closed.reliable
    assert "Nothing is left open." in str(closed)


def test_attacks_expose_a_false_certificate(
        digits_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = evaluation.certificate_of

    def believing(*args: Any, **options: Any) -> Certificate:
        found = real(*args, **options)
        return dataclasses.replace(found, certified=found.correct)
    monkeypatch.setattr(evaluation, "certificate_of", believing)
    result = qg.evaluate(*digits_model, qg.Threat(eps=0.2), suite="quick", certify=True,
                         progress=False)
    assert result.refuted and not result.reliable and result.bracket[0] == 0
    assert [f.raised for f in result.flags if f.name == "certificate broken"] == [True]
    assert str(result).startswith("NOT ROBUST: Robust accuracy <= ")
    assert "Please report it" in str(result)


@pytest.mark.slow
def test_a_bracket_resumes_and_is_compared(
        digits_model: Any, bracket: qg.Evaluation, tmp_path: Path) -> None:
    model, loader = digits_model
    threat, where = qg.Threat(eps=0.02), tmp_path / "run"
    options: dict[str, Any] = {"suite": "quick", "progress": False, "run_dir": where}
    one = qg.evaluate(model, loader, threat, certify=True, **options)
    again = qg.evaluate(model, loader, threat, certify=True, **options)
    assert (again.survived == one.survived).all() and (one.survived == bracket.survived).all()
    with pytest.raises(qg.SpecError, match="Different: the certified images"):
        qg.evaluate(model, loader, threat, **options)
    table = qg.compare({"2 bits": model, "again": model}, loader, threat, suite="quick",
                       certify=True, progress=False)
    assert "certified" in str(table) and "certified" in table._repr_html_()
    recurrent = nn.Sequential(nn.Flatten(), nn.GLU(), nn.Linear(32, 10))
    with pytest.raises(qg.ConversionError, match=r"^gated: .*1.*GLU"):
        qg.compare({"gated": recurrent}, loader, threat, suite="quick", certify=True,
                   progress=False)
    table.save(tmp_path / "page.html")
    assert "true robust accuracy" in (tmp_path / "page.html").read_text()


def test_a_bracket_on_the_command_line(digits_model: Any, bracket: qg.Evaluation,
                                       tmp_path: Path) -> None:
    from click.testing import CliRunner

    from quantguard.cli.main import main
    qg.save(digits_model[0], tmp_path / "model.qg")
    result = CliRunner().invoke(main, [
        "evaluate", str(tmp_path / "model.qg"), "--trust", "--data", "digits", "--eps", "0.02",
        "--images", "100", "--suite", "quick", "--certify", "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("PROVEN ROBUST: Certified "), result.output
