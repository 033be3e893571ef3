"""The order of attacks, and what runs if time is short."""

from __future__ import annotations

import time
import weakref
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from evaluation_suites import Bright, Stub, dim, entry, grey, labels, measured, raised

import quantguard as qg
from quantguard.attacks import PGD, Entry, Suite, suites
from quantguard.attacks.suites import build_suite
from quantguard.core.errors import SpecError
from quantguard.core.specs import Threat
from quantguard.evaluation import evaluator as evaluation
from quantguard.evaluation import suite_runner as schedule
from quantguard.evaluation.evaluator import seconds_of
from quantguard.evaluation.results import Evaluation


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the suite ``quick`` to a few steps of every attack."""
    monkeypatch.setitem(suites._SUITES, "quick", (4, 20, 60))


def run(suite: Suite | list[Entry], monkeypatch: pytest.MonkeyPatch, n: int = 60,
        **options: Any) -> Evaluation:
    asked: Any = suite
    if isinstance(suite, Suite):
        monkeypatch.setattr(evaluation, "build_suite", lambda *_, **__: suite)
        asked = suite.entries
    return qg.evaluate(Bright(), dim(n), Threat(eps=0.2), suite=asked, progress=False, **options)


def test_attacks_that_do_not_fit_are_left_out_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite([entry("first", seconds=0.1), entry("long", steps=100, seconds=9),
                   entry("short", seconds=0.1)], gradient_free=[entry("gradient-free", "transfer")])
    result = run(suite, monkeypatch, budget=8.0)
    assert labels(result) == ["first", "short", "gradient-free"] and result.skipped == ("long",)
    flag = {f.name: f for f in result.flags}["attacks left out"]
    assert flag.raised and flag.kind == "undecided" and "long" in flag.reason
    assert result.verdict != "resolved" and "No time was left for long" in str(result)


def test_the_speed_of_noise_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first call compiles, so that its speed would leave no time for a hundred steps."""
    suite = Suite([entry("noise", "noise", seconds=1.0), entry("PGD", steps=100),
                   entry("softened", "softened", steps=100)],
                  reseeded=[entry("again", "reseeded", steps=100)])
    assert labels(run(suite, monkeypatch, budget=6.0)) == ["noise", "PGD", "softened", "again"]


def test_escalation_leaves_time_for_gradient_free_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [entry(f"round {i}", "escalation", seconds=0.2, breaks=9) for i in range(30)]
    suite = Suite([entry("first", seconds=0.2)], rounds, [entry("again", "reseeded", seconds=0.2)],
                  [entry("gradient-free", "transfer", seconds=0.2)])
    begin = time.monotonic()
    result = run(suite, monkeypatch, 250, budget=9.0)
    assert labels(result)[-2:] == ["again", "gradient-free"] and 2 < len(result.attacks) < 33
    assert time.monotonic() - begin < 18


@pytest.mark.parametrize("patience", [2, 4])
def test_escalation_ends_after_several_rounds_in_a_row_break_almost_nothing(
        patience: int, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks = [0, 0, 0, 5, *[0] * 9]  # the fourth pays, if it comes to that
    rounds = [entry(f"{i}", "escalation", breaks=b) for i, b in enumerate(breaks)]
    result = run(Suite([entry("first")], rounds, patience=patience), monkeypatch)
    assert labels(result) == ["first", *map(str, range(2 if patience == 2 else 8))]


def test_quantized_models_have_two_rounds_of_each_kind_of_windows() -> None:
    threat = Threat(eps=0.1)
    for options, patience in (({}, 2), ({"softenable": True}, 4)):
        suite = suites.build_suite("quick", threat, seed=0, quantized=False, **options)
        assert suite.patience == patience
        first = [vars(entry.attack)["by_image"] for entry in suite.rounds[:4]]
        assert first == [False, True, False, True]


def test_without_a_budget_every_attack_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(Suite([entry("a"), entry("b", steps=10**6)]), monkeypatch)
    assert labels(result) == ["a", "b"] and not result.skipped


@pytest.mark.parametrize(("text", "seconds"), [
    ("90s", 90), ("5m", 300), ("2h", 7200), ("1.5m", 90), (7, 7), (0.5, 0.5), (" 3 m ", 180)])
def test_budgets_are_read(text: float | str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "5 minutes", "-3s", 0, "0s", "m", "nan", float("inf")])
def test_a_malformed_budget_is_an_error(text: float | str) -> None:
    with pytest.raises(SpecError, match="is no time"):
        seconds_of(text)


def test_a_resumed_run_leaves_the_same_attacks_out(tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite([entry("first", seconds=0.1), entry("long", steps=100, seconds=9),
                   entry("short", breaks=7)])
    one, two = (run(suite, monkeypatch, run_dir=tmp_path, budget=b) for b in (3.0, 1000.0))
    assert labels(one) == labels(two) == ["first", "short"] and two.skipped == ("long",)
    assert np.array_equal(one.survived, two.survived)


def test_the_surrogate_with_the_highest_fidelity_runs_first() -> None:
    def order(**fidelity: float) -> list[str]:
        known = {name.replace("_", " "): v for name, v in fidelity.items()}
        entries = build_suite("standard", Threat(), seed=0, quantized=True, fidelity=known).entries
        return list(dict.fromkeys(e.group for e in entries if e.group in ("modes", "softened")))
    assert order(ramp=0.9, softened_k_8=0.1) == ["modes", "softened"]
    assert order(ramp=0.1, softened_k_8=0.9) == ["softened", "modes"]


def test_reseeded_runs_attack_the_same_few_survivors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_RESEEDED", 20)
    again = [entry(f"again {i}", "reseeded", breaks=i) for i in range(3)]
    result = run(Suite([entry("first", breaks=5)], reseeded=again), monkeypatch)
    rows = [set(np.flatnonzero(a.attacked)) for a in result.attacks[1:]]
    assert rows[:3] == [set(range(5, 25))] * 3
    # they break some of these, so that they run on the other survivors, too
    assert labels(result)[4:] == [f"again {i}, the others" for i in range(3)]
    assert rows[3:5] == [set(range(25, 60))] * 2 and rows[5] == set(range(26, 60))
    assert int(result.survived.sum()) == 60 - 5 - 2 - 3
    flag = {f.name: f for f in result.flags}["another seed breaks more"]
    assert flag.reason.startswith("Of 20 survivors, exactly one of 3 reseeded runs broke 1")


def test_reseeded_attacks_skip_the_other_survivors_if_no_seed_breaks_any(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_RESEEDED", 20)
    result = run(Suite([entry("first")], reseeded=[entry("again", "reseeded")]), monkeypatch)
    assert labels(result) == ["first", "again"]


def test_white_box_attacks_get_time_before_gradient_free_ones(
        monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite([entry("first", seconds=0.1), entry("softened", "softened", seconds=0.1)],
                  gradient_free=[entry("Square", "query", seconds=3.0, steps=3000)])
    result = run(suite, monkeypatch, 60, budget=6.0)
    assert labels(result) == ["first", "softened"] and result.skipped == ("Square",)


def test_a_run_that_used_its_budget_runs_no_more_attacks_when_repeated(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    suite = Suite([entry(f"attack {i}", seconds=0.9) for i in range(6)])
    ran = [labels(run(suite, monkeypatch, 60, budget=3.0, run_dir=tmp_path)) for _ in range(3)]
    assert ran[0] == ran[1] == ran[2] and 0 < len(ran[0]) < 6
    more = labels(run(suite, monkeypatch, 60, budget=60.0, run_dir=tmp_path))
    assert more == [f"attack {i}" for i in range(6)]
class Rounds(PGD):
    """Break a given number of survivors, and record the starting points."""

    log: ClassVar[weakref.WeakKeyDictionary[Rounds, list[Any]]] = weakref.WeakKeyDictionary()

    def __init__(self, share: int, restart: bool = False) -> None:
        super().__init__("ce", 1, restart=restart)
        self.share = share

    @property
    def starts(self) -> list[Any]:
        """The starting points of all runs; not a setting of the attack."""
        return self.log.setdefault(self, [])

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            starting_points: Any = None, **kwargs: Any) -> Any:
        self.starts.append(starting_points)
        found = inputs.clone()
        if len(self.starts) == 1:  # the first batch
            found[: self.share] = 0.55
        return found


@pytest.mark.parametrize(("breaks", "ran"), [
    ([5, 0, 1, 9], 3), ([0, 0, 9], 2), ([5, 1, 5, 1, 0, 9], 5), ([3, 3, 3], 3)])
def test_rounds_run_until_two_in_a_row_break_almost_nothing(
        breaks: list[int], ran: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [Entry(f"round {i}", Rounds(k, restart=i == 1), "escalation")
              for i, k in enumerate(breaks)]
    first, last = Entry("first", Stub(-0.1), "pgd", True), Entry("last", Stub(-0.1), "transfer")
    monkeypatch.setattr(evaluation, "build_suite",
                        lambda *_, **__: Suite([first], rounds, gradient_free=[last]))
    loader = grey(*[0.45] * 250)  # 0.55 is another class; 1 of 250 images does not pay, 2 do
    results = [measured(Bright(), loader, Threat(eps=0.2), run_dir=tmp_path) for _ in range(2)]
    for result in results:  # the second takes what the first has left in the run directory
        assert [a.label for a in result.attacks] == [
            "first", *(f"round {i}" for i in range(ran)), "last"]
        assert [int(a.broken.sum()) for a in result.attacks[1:-1]] == breaks[:ran]
        assert int(result.survived.sum()) == 250 - sum(breaks[:ran])
        pays = ran == len(breaks) and max(breaks[-2:]) > 1
        assert ("escalation still pays" in raised(result)) == pays
    assert all(start is None for start in rounds[0].attack.starts)
    assert all(start is not None for start in rounds[1].attack.starts)
    assert len(rounds[0].attack.starts) == 4  # batches, once
