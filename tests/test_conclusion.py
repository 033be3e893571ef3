"""One plain verdict: the rule, where it is said, and what it stands beside."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import foolbox as fb
import numpy as np
import pytest
from torch import Tensor, nn

import quantguard as qg
from quantguard import masking
from quantguard.attacks import PGD, Entry, suites
from quantguard.errors import QuantguardError
from quantguard.masking import HALF, Flag, conclusion, wilson
from quantguard.pipeline import Comparison, compare
from quantguard.report import evaluation_html, page
from quantguard.report.text import columns
from quantguard.results import Evaluation
from quantguard.spec import Threat

Digits = tuple[Tensor, Tensor]
ORDER = ["no figure", "proven robust", "not robust", "hidden gradients", "not settled",
         "robust as measured"]


def flags(*kinds: str) -> list[Flag]:
    names = {"withheld": ("random forward", "unresolved")}
    return [Flag(*names.get(kind, (kind, kind)), True, 0, 0, "", "") for kind in kinds]


@pytest.mark.parametrize(("kinds", "correct", "survived", "certified", "said"), [
    (["withheld", "masked"], 190, 180, 180, "no figure"),
    (["masked", "undecided"], 190, 180, 150, "proven robust"),
    (["masked", "unresolved"], 190, 60, 0, "not robust"),
    (["undecided"], 190, 6, 0, "not robust"),  # 3 %: more images would change nothing
    ([], 190, 0, 0, "not robust"), ([], 0, 0, 0, "not robust"),
    (["masked", "undecided"], 190, 120, 90, "hidden gradients"),
    (["unresolved"], 190, 120, 0, "not settled"), (["undecided"], 190, 120, 0, "not settled"),
    ([], 190, 120, 0, "robust as measured")])
def test_the_first_that_applies_is_said(kinds: list[str], correct: int, survived: int,
                                        certified: int, said: str) -> None:
    raised = flags(*kinds)
    settled = masking.verdict(tuple(raised))
    assert conclusion(raised, 200, correct, survived, certified, settled) == said
    silent = [replace(flag, raised=False) for flag in raised]
    assert conclusion(silent, 200, correct, survived, 0, "resolved") in (
        "not robust", "robust as measured")


@pytest.mark.parametrize("n", [20, 200, 5000])
def test_it_turns_where_an_end_of_the_interval_meets_half_of_clean(n: int) -> None:
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


def test_a_model_that_is_not_robust_is_said_to_be_so_first(weak: Evaluation) -> None:
    first = str(weak).splitlines()[0]
    assert weak.conclusion == "not robust"
    assert first.startswith("NOT ROBUST: Robust accuracy <= ")
    assert "images have as many" not in str(weak)
    assert "NOT ROBUST: Robust accuracy" in evaluation_html(weak)
    assert "not robust" in page(Comparison({"weak": weak}))
    told = json.loads(json.dumps(weak.to_dict()))
    assert told["conclusion"] == "not robust" and told["verdict"] == weak.verdict
    assert Evaluation.from_dict(told).conclusion == weak.conclusion


def test_it_never_stands_without_its_figure(weak: Evaluation) -> None:
    for kinds in ([], ["masked"], ["undecided"], ["unresolved"], ["masked", "unresolved"]):
        for survived in (weak.survived, weak.correct):
            result = replace(weak, flags=tuple(flags(*kinds)), survived=survived)
            first = str(result).splitlines()[0]
            assert first.startswith(result.conclusion.upper() + ": ")
            assert f"{100 * result.robust_accuracy:.1f} %" in first
            assert ("hides its gradients" in first) == ("masked" in kinds)
    said = {replace(weak, flags=tuple(flags(k)), survived=weak.correct).conclusion
            for k in ("masked", "undecided", "unresolved")}
    assert said == {"hidden gradients", "not settled"}


def test_no_figure_is_first_of_all(weak: Evaluation) -> None:
    result = replace(weak, flags=tuple(flags("withheld")))
    assert result.conclusion == "no figure" and str(result).startswith("NO FIGURE")


# --- the curve is of the same images ---


def test_the_curve_at_the_threats_eps_is_the_headline(cnn: nn.Module, quantized: nn.Module,
                                                      digits: Digits) -> None:
    x, y = digits[0][:80], digits[1][:80]  # more than the 30 that are attacked anew
    threat = Threat(eps=0.1)
    both = compare({"float": cnn, "2 bits": quantized}, [(x, y)], threat, suite="quick",
                   progress=False)
    for result in both.rows.values():
        points = {p.eps: p for p in result.curve}
        assert {p.images for p in result.curve} == {80}
        assert points[0.0].standing == int(result.correct.sum())
        assert points[threat.eps].standing == int(result.survived.sum())
        standing = [p.standing for p in result.curve]
        assert standing == sorted(standing, reverse=True)
        assert "the same 80 images" in str(result)
    old = replace(result, curve=tuple(replace(p, images=30) for p in result.curve))
    assert "the first 30 of 80 images" in str(old)


# --- attacks of a list: one alone, one that raises ---


def test_one_attack_alone_is_a_suite_of_one(cnn: nn.Module, digits: Digits) -> None:
    x, y = digits[0][:20], digits[1][:20]
    for attack in (fb.attacks.LinfPGD(steps=3), PGD("ce", 3), Entry("mine", PGD("ce", 3), "pgd")):
        alone, one = (qg.evaluate(cnn, [(x, y)], Threat(eps=0.1), suite=suite, progress=False)
                      for suite in (attack, [attack]))
        assert np.array_equal(alone.survived, one.survived) and len(alone.attacks) == 1
    rows = compare({"a": cnn}, [(x, y)], Threat(eps=0.1), suite=PGD("ce", 3), progress=False).rows
    assert len(rows["a"].attacks) == 1
    for nothing in (7, None, {"quick": 1}, [], [None]):
        with pytest.raises(QuantguardError):
            qg.evaluate(cnn, [(x, y)], suite=nothing, progress=False)  # type: ignore[arg-type]


class Raising(PGD):
    """Break what PGD breaks in the first batches, then raise."""

    def __init__(self, after: int) -> None:
        super().__init__("ce", 10)
        self.after = after

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.after -= 1
        if self.after < 0:
            raise ValueError("no more\nof this")
        return super().run(*args, **kwargs)


@pytest.mark.parametrize("after", [0, 1])
def test_an_attack_that_raises_is_a_row_and_the_others_count(after: int, cnn: nn.Module,
                                                             digits: Digits,
                                                             untouched: Any) -> None:
    x, y = digits[0][:90], digits[1][:90]
    with untouched(cnn):
        result = qg.evaluate(cnn, [(x, y)], Threat(eps=0.1), progress=False, suite=[
            Raising(after), fb.attacks.DatasetAttack(), fb.attacks.LinfPGD(steps=2)])
    alone = qg.evaluate(cnn, [(x, y)], Threat(eps=0.1), progress=False,
                        suite=[fb.attacks.LinfPGD(steps=2)])
    first, second, third = result.attacks
    assert first.error == "ValueError: no more" and int(first.attacked.sum()) == 64 * after
    assert bool(first.broke.any()) == bool(after) and not (first.broke & ~first.attacked).any()
    assert second.error and not second.attacked.any() and third.error is None
    assert (result.survived <= alone.survived).all() and not result.survived.all()
    assert result.verdict != "resolved"
    flag = {f.name: f for f in result.flags}["attacks failed"]
    assert flag.raised and flag.kind == "undecided" and "DatasetAttack 2" in flag.reason
    assert "Raising 1: ValueError: no more" in str(result)
    told = json.loads(json.dumps(result.to_dict()))
    assert [a.error for a in Evaluation.from_dict(told).attacks] == [
        a.error for a in result.attacks]
    assert "Raising 1" not in columns(result)  # it would be of fewer images


def test_where_every_attack_raises_there_is_no_figure(cnn: nn.Module, digits: Digits) -> None:
    with pytest.raises(QuantguardError, match="Raising 1 failed: ValueError: no more"):
        qg.evaluate(cnn, [(digits[0][:9], digits[1][:9])], suite=[Raising(0)], progress=False)


def test_what_was_broken_already_takes_one_line(cnn: nn.Module, digits: Digits) -> None:
    x, y = digits[0][:20], digits[1][:20]
    result = qg.evaluate(cnn, [(x, y)], Threat(eps=1.0), suite="quick", progress=False)
    lines = str(result).splitlines()
    idle = [a for a in result.attacks if not a.attacked.any()]
    assert not result.survived.any() and len(idle) > 5
    assert sum("all was broken" in line for line in lines) == 1
    assert f"and {len(idle) - 1} more: all was broken" in str(result)
    assert len(lines) < 20
