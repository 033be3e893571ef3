"""Tables and pages: figures with intervals, self-contained HTML, escaped names."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

import quantguard as qg
from quantguard.attacks import PGD, Entry
from quantguard.attacks.base import fb
from quantguard.core.rendering import Cell, table
from quantguard.core.specs import Threat
from quantguard.core.statistics import clopper_pearson, wilson
from quantguard.evaluation import attack_flags
from quantguard.evaluation.comparison import Comparison
from quantguard.evaluation.flags import ENOUGH
from quantguard.evaluation.report import comparison_html, comparison_text, evaluation_html, page
from quantguard.evaluation.report.text import columns, flag_lines
from quantguard.evaluation.results import Evaluation

EVIL = "<script>alert('x')</script> & \"co\""


@pytest.fixture(scope="module")
def rows(cnn: nn.Module, quantized: nn.Module, digits: tuple[Tensor, Tensor]) -> Comparison:
    suite = [Entry("FGSM", fb.attacks.LinfFastGradientAttack(), "fgsm", True),
             Entry("PGD-8", PGD("ce", 8), "pgd", True),
             Entry("C&W L2", fb.attacks.L2CarliniWagnerAttack(2, 8), "cw", True),
             Entry("softened", PGD("margin", 20, sharpness=(2, 16)), "softened")]
    return qg.compare({"float": cnn, EVIL: quantized}, [(digits[0][:80], digits[1][:80])],
                      Threat(eps=0.1), suite=suite, progress=False)


class Checker(HTMLParser):
    """Collect tags, links and text; every tag that is opened must be closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [v or "" for k, v in attributes if k in ("src", "href", "data", "action")]
        assert not [k for k, _ in attributes if k.startswith("on")]
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open
    return checker


def test_the_page_is_self_contained_and_well_formed(rows: Comparison) -> None:
    text = page(rows)
    assert not re.search(r"https?://|//[a-z]|@import|url\(|<script|<link|<iframe", text)
    checker = checked(text)
    assert not checker.links and "script" not in checker.tags
    assert {"html", "head", "body", "title", "table"} <= checker.tags
    assert text.count("<meta charset") == 1


@pytest.mark.parametrize("render", [page, comparison_html])
def test_names_are_escaped_and_still_readable(render: Any, rows: Comparison) -> None:
    text = render(rows)
    assert "<script" not in text
    assert EVIL in checked(text).text and "C&W L2" in checked(text).text


def test_everything_that_a_page_shows_of_an_attack_or_flag_is_escaped(rows: Comparison) -> None:
    evaluation = rows.rows["float"]
    flag = dataclasses.replace(evaluation.flags[0], name=EVIL, reason=EVIL, test=EVIL, raised=True)
    attack = evaluation.attacks[0]
    attack = dataclasses.replace(attack, settings={**attack.settings, "label": EVIL})
    evaluation = dataclasses.replace(evaluation, flags=(flag,), attacks=(attack,), suite=EVIL,
                                     environment={EVIL: EVIL})
    comparison = Comparison({EVIL: evaluation}, notes=(EVIL,), settings={EVIL: EVIL})
    for text in (page(comparison), comparison_html(comparison), evaluation_html(evaluation)):
        assert "<script" not in text
        checked(text)


def test_the_page_shows_what_is_needed_to_reproduce_it(rows: Comparison) -> None:
    text = checked(page(rows)).text
    one = next(iter(rows.rows.values()))
    for expected in (one.image_hash, one.environment["torch"], "eps 0.1", "80 images",
                     "95 % interval",
                 "upper bounds of the truth"):
        assert expected in text


def test_text_tables_have_intervals_n_and_the_bound(rows: Comparison) -> None:
    text = comparison_text(rows)
    assert "Per cent of 80 images [95 % interval]" in text and "upper bounds" in text
    for name, evaluation in rows.rows.items():
        survived = int(evaluation.survived.sum())
        low, high = (100 * v for v in wilson(survived, 80))
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert f"{100 * (survived / 80):.1f} [{low:.1f}-{high:.1f}]" in line
        assert line.endswith(evaluation.verdict)
        alone = str(evaluation)
        assert f"{survived} of 80 images survive" in alone and "Clean accuracy" in alone
        assert f"{low:.1f}-{high:.1f}" in alone
    assert "exact McNemar p =" in text and "[masked]" in text
    assert comparison_text(rows) == str(rows)


def test_columns_are_clean_the_attacks_on_all_images_and_the_worst_case(rows: Comparison) -> None:
    evaluation = next(iter(rows.rows.values()))
    cells = columns(evaluation)
    assert list(cells) == ["clean", "FGSM", "PGD-8", "C&W L2", "worst case"]
    assert cells["clean"].count == evaluation.correct.sum()
    assert cells["worst case"].count == evaluation.survived.sum()
    assert min(c.count for c in cells.values()) == cells["worst case"].count
    assert all(c.n == 80 for c in cells.values())


def test_minimum_norm_attacks_are_shown_by_their_own_measure(rows: Comparison) -> None:
    evaluation = next(iter(rows.rows.values()))
    carlini = evaluation.attacks[2]
    line = f"C&W L2 by its own measure: succeeds on {carlini.own_success} of "
    assert line in str(evaluation) and line in checked(evaluation_html(evaluation)).text


@pytest.mark.parametrize(("count", "expected"), [
    (0, "0.0 [0.0-11.4]"), (30, "100.0 [88.6-100.0]"), (15, "50.0 [33.2-66.8]")])
def test_a_cell_is_a_share_with_its_interval(count: int, expected: str) -> None:
    assert str(Cell(count, 30)) == expected


def test_tables_are_aligned() -> None:
    lines = table([["a", "long head"], ["longer", "b"]]).splitlines()
    assert lines == ["a       long head", "------  ---------", "longer  b"]


def test_models_without_correct_images_and_rows_of_other_suites_are_shown(rows: Comparison) -> None:
    one = next(iter(rows.rows.values()))
    nothing = dataclasses.replace(
        one, correct=np.zeros(80, bool), survived=np.zeros(80, bool), attacks=one.attacks[:1],
        flags=())
    mixed = Comparison({"all": one, "nothing": nothing})
    assert "0.0 [0.0-4.6]" in str(mixed) and " -  " in str(mixed)
    checked(page(mixed))


def test_notebooks_get_html(rows: Comparison) -> None:
    evaluation = next(iter(rows.rows.values()))
    assert isinstance(evaluation, Evaluation)
    assert checked(evaluation._repr_html_()).text and checked(rows._repr_html_()).text


def test_flags_with_too_few_images_share_a_line_and_the_gravest_come_first(
        rows: Comparison) -> None:
    one = next(iter(rows.rows.values()))
    flags = (attack_flags.gradient_free_beats_white_box("noise", 0, 3),
             attack_flags.attacks_left_out(["PGD"]),
             attack_flags.gradient_free_beats_white_box("transfer", 0, 3),
             attack_flags.default_attacks_overstate(30, 80, 10))
    lines = flag_lines(dataclasses.replace(one, flags=flags))
    assert [line.split("]")[0] for line in lines] == ["[masked", "[undecided", "[undecided"]
    assert "noise beats white-box, transfer beats white-box" in lines[2] and "149" in lines[2]
    assert clopper_pearson(0, ENOUGH)[1] < 0.02
    assert clopper_pearson(0, ENOUGH - 1)[1] > 0.02
    text = str(dataclasses.replace(one, flags=flags))
    assert "hides its gradients: default attacks overstate." in text.splitlines()[0]


def test_low_clean_accuracy_hints_at_normalisation(rows: Comparison) -> None:
    one = next(iter(rows.rows.values()))
    wrong = dataclasses.replace(one, correct=np.arange(80) < 30, survived=np.zeros(80, bool))
    assert "normalised" in str(wrong) and "normalised" not in str(one)
    knows = dataclasses.replace(wrong, threat=Threat(mean=(0.5,), std=(0.5,)))
    assert "normalised" not in str(knows)


def test_a_certificate_is_shown_in_whichever_row_has_it(rows: Comparison) -> None:
    """The demo certifies its last row alone."""
    names = list(rows.rows)
    evaluation = rows.rows[names[1]]
    certificate = qg.Certificate(
        evaluation.survived, evaluation.correct, np.zeros(evaluation.images), {}, 1.0,
        evaluation.threat, "ibp", {}, evaluation.image_hash)
    proven = dataclasses.replace(evaluation, certificate=certificate)
    for order in (0, 1):
        found = dict(rows.rows)
        found[names[order]] = dataclasses.replace(proven)
        comparison = dataclasses.replace(rows, rows=found)
        for shown in (comparison_text(comparison), comparison_html(comparison)):
            assert "certified" in shown and "lower bounds" in shown.replace("\n", " ")
    assert "certified" not in comparison_text(rows)
