"""Conclusions: the rule, and how reports show them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from evaluation_suites import Digits
from torch import nn

import quantguard as qg
from quantguard.attacks import PGD, suites
from quantguard.core.specs import Threat
from quantguard.core.statistics import wilson
from quantguard.evaluation.comparison import Comparison
from quantguard.evaluation.flags import HALF, Flag, conclusion, verdict
from quantguard.evaluation.report import evaluation_html, page
from quantguard.evaluation.results import Evaluation

ORDER = ["no figure", "proven robust", "not robust", "hidden gradients", "not settled",
         "robust as measured"]


def flags(*kinds: str) -> list[Flag]:
    names = {"withheld": ("random forward", "unresolved")}
    return [Flag(*names.get(kind, (kind, kind)), True, 0, 0, "", "") for kind in kinds]


@pytest.mark.parametrize(("kinds", "correct", "survived", "certified", "expected"), [
    (["withheld", "masked"], 190, 180, 180, "no figure"),
    (["masked", "undecided"], 190, 180, 150, "proven robust"),
    (["masked", "unresolved"], 190, 60, 0, "not robust"),
    (["undecided"], 190, 6, 0, "not robust"),  # 3 %: more images would change nothing
    ([], 190, 0, 0, "not robust"), ([], 0, 0, 0, "not robust"),
    (["masked", "undecided"], 190, 120, 90, "hidden gradients"),
    (["unresolved"], 190, 120, 0, "not settled"), (["undecided"], 190, 120, 0, "not settled"),
    ([], 190, 120, 0, "robust as measured")])
def test_the_first_phrase_that_applies_is_the_conclusion(
        kinds: list[str], correct: int, survived: int, certified: int, expected: str) -> None:
    raised = flags(*kinds)
    outcome = verdict(tuple(raised))
    assert conclusion(raised, 200, correct, survived, certified, outcome) == expected
    silent = [replace(flag, raised=False) for flag in raised]
    assert conclusion(silent, 200, correct, survived, 0, "resolved") in (
        "not robust", "robust as measured")


@pytest.mark.parametrize("n", [20, 200, 5000])
def test_it_changes_where_an_end_of_the_interval_meets_half_of_clean_accuracy(n: int) -> None:
    correct = int(0.9 * n)
    for count in range(1, correct):
        low, high = wilson(count, n)
        half = HALF * correct / n
        assert (conclusion([], n, correct, correct, count, "resolved") == "proven robust") \
            == (low >= half)
        assert (conclusion([], n, correct, count, 0, "resolved") == "not robust") == (high < half)


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites._SUITES, "quick", (4, 20, 30))


@pytest.fixture(scope="module")
def weak(cnn: nn.Module, digits: Digits) -> Evaluation:
    x, y = digits[0][:60], digits[1][:60]
    return qg.evaluate(cnn, [(x, y)], Threat(eps=0.3), suite=[PGD("ce", 10)], progress=False)


def test_the_first_line_says_that_a_model_is_not_robust(weak: Evaluation) -> None:
    first = str(weak).splitlines()[0]
    assert weak.conclusion == "not robust"
    assert first.startswith("NOT ROBUST: Robust accuracy <= ")
    assert "give as many" not in str(weak)
    assert "NOT ROBUST: Robust accuracy" in evaluation_html(weak)
    assert "not robust" in page(Comparison({"weak": weak}))
    data = json.loads(json.dumps(weak.to_dict()))
    assert data["conclusion"] == "not robust" and data["verdict"] == weak.verdict
    assert Evaluation.from_dict(data).conclusion == weak.conclusion


def test_the_conclusion_is_always_followed_by_its_figure(weak: Evaluation) -> None:
    for kinds in ([], ["masked"], ["undecided"], ["unresolved"], ["masked", "unresolved"]):
        for survived in (weak.survived, weak.correct):
            result = replace(weak, flags=tuple(flags(*kinds)), survived=survived)
            first = str(result).splitlines()[0]
            assert first.startswith(result.conclusion.upper() + ": ")
            assert f"{100 * result.robust_accuracy:.1f} %" in first
            assert ("hides its gradients" in first) == ("masked" in kinds)
    found = {replace(weak, flags=tuple(flags(k)), survived=weak.correct).conclusion
            for k in ("masked", "undecided", "unresolved")}
    assert found == {"hidden gradients", "not settled"}


def test_no_figure_overrides_every_other_conclusion(weak: Evaluation) -> None:
    result = replace(weak, flags=tuple(flags("withheld")))
    assert result.conclusion == "no figure" and str(result).startswith("NO FIGURE")


def test_attacks_without_images_share_one_line(cnn: nn.Module, digits: Digits) -> None:
    x, y = digits[0][:20], digits[1][:20]
    result = qg.evaluate(cnn, [(x, y)], Threat(eps=1.0), suite="quick", progress=False)
    lines = str(result).splitlines()
    idle = [a for a in result.attacks if not a.attacked.any()]
    assert not result.survived.any() and len(idle) > 5
    assert sum("all was broken" in line for line in lines) == 1
    assert f"and {len(idle) - 1} more: all was broken" in str(result)
    assert len(lines) < 20
