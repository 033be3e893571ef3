"""What runs when time is short, what is run again, and accuracy over eps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard import curve, evaluation, schedule
from quantguard.attacks import PGD, Entry, Square, Suite, suites
from quantguard.attacks.suites import build_suite
from quantguard.errors import DataError, SpecError
from quantguard.evaluation import seconds_of
from quantguard.results import Evaluation
from quantguard.spec import Threat

Digits = tuple[Tensor, Tensor]


class Slow(PGD):
    """Take a stated time a batch, and break images whose number in the batch is below ``breaks``.
    """

    def __init__(self, seconds: float = 0.0, breaks: int = 0, steps: int = 1) -> None:
        super().__init__("ce", steps)
        self.wait, self.breaks = seconds, breaks

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            **kwargs: Any) -> Any:
        time.sleep(self.wait)
        found = inputs.clone()
        found[: self.breaks] = 0.55
        return found


class Bright(nn.Module):
    """Class 1 above a mean of a half."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1) - 0.5
        return torch.stack([-mean, mean], 1)


def dim(n: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.full((n, 1, 4, 4), 0.45), torch.zeros(n).long()),
                      batch_size=50)


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``quick`` be quicker: every attack, few steps."""
    monkeypatch.setitem(suites._SUITES, "quick", (4, 20, 60))


def run(suite: Suite | list[Entry], monkeypatch: pytest.MonkeyPatch, n: int = 60,
        **options: Any) -> Evaluation:
    asked: Any = suite
    if isinstance(suite, Suite):
        monkeypatch.setattr(evaluation, "build_suite", lambda *_, **__: suite)
        asked = suite.entries
    return qg.evaluate(Bright(), dim(n), Threat(eps=0.2), suite=asked, progress=False, **options)


def labels(result: Evaluation) -> list[str]:
    return [attack.label for attack in result.attacks]


# --- budget ---


def entry(name: str, group: str = "pgd", **options: Any) -> Entry:
    return Entry(name, Slow(**options), group)


def test_what_does_not_fit_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite([entry("first", seconds=0.1), entry("long", steps=100, seconds=9),
                   entry("short", seconds=0.1)], blind=[entry("blind", "transfer")])
    result = run(suite, monkeypatch, budget=8.0)
    assert labels(result) == ["first", "short", "blind"] and result.skipped == ("long",)
    flag = {f.name: f for f in result.flags}["attacks left out"]
    assert flag.raised and flag.kind == "undecided" and "long" in flag.reason
    assert result.verdict != "resolved" and "No time was left for long" in str(result)


def test_noise_is_no_measure_of_what_an_attack_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first call compiles: a second for one step would leave no time for a hundred."""
    suite = Suite([entry("noise", "noise", seconds=1.0), entry("PGD", steps=100),
                   entry("twin", "twin", steps=100)],
                  reseeded=[entry("again", "reseeded", steps=100)])
    assert labels(run(suite, monkeypatch, budget=6.0)) == ["noise", "PGD", "twin", "again"]


def test_escalation_leaves_time_for_what_sees_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [entry(f"round {i}", "escalation", seconds=0.2, breaks=9) for i in range(30)]
    suite = Suite([entry("first", seconds=0.2)], rounds, [entry("again", "reseeded", seconds=0.2)],
                  [entry("blind", "transfer", seconds=0.2)])
    begin = time.monotonic()
    result = run(suite, monkeypatch, 250, budget=6.0)
    assert labels(result)[-2:] == ["again", "blind"] and 2 < len(result.attacks) < 33
    assert time.monotonic() - begin < 12


@pytest.mark.parametrize("patience", [2, 4])
def test_escalation_ends_when_so_many_in_a_row_break_next_to_nothing(
        patience: int, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks = [0, 0, 0, 5, *[0] * 9]  # the fourth pays, if it comes to that
    rounds = [entry(f"{i}", "escalation", breaks=b) for i, b in enumerate(breaks)]
    result = run(Suite([entry("first")], rounds, patience=patience), monkeypatch)
    assert labels(result) == ["first", *map(str, range(2 if patience == 2 else 8))]


def test_quantized_models_have_two_rounds_of_each_kind_of_windows() -> None:
    threat = Threat(eps=0.1)
    for options, patience in (({}, 2), ({"foreign": True}, 4)):
        suite = suites.build_suite("quick", threat, seed=0, quantized=False, **options)
        assert suite.patience == patience
        first = [vars(entry.attack)["by_image"] for entry in suite.rounds[:4]]
        assert first == [False, True, False, True]


def test_without_a_budget_all_of_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(Suite([entry("a"), entry("b", steps=10**6)]), monkeypatch)
    assert labels(result) == ["a", "b"] and not result.skipped


@pytest.mark.parametrize(("said", "seconds"), [
    ("90s", 90), ("5m", 300), ("2h", 7200), ("1.5m", 90), (7, 7), (0.5, 0.5), (" 3 m ", 180)])
def test_budgets_are_read(said: float | str, seconds: float) -> None:
    assert seconds_of(said) == seconds


@pytest.mark.parametrize("said", ["", "5 minutes", "-3s", 0, "0s", "m", "nan", float("inf")])
def test_what_is_no_budget_is_refused(said: float | str) -> None:
    with pytest.raises(SpecError, match="is no time"):
        seconds_of(said)


def test_a_resumed_budget_leaves_the_same_out(tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite([entry("first", seconds=0.1), entry("long", steps=100, seconds=9),
                   entry("short", breaks=7)])
    one, two = (run(suite, monkeypatch, run_dir=tmp_path, budget=b) for b in (3.0, 1000.0))
    assert labels(one) == labels(two) == ["first", "short"] and two.skipped == ("long",)
    assert np.array_equal(one.survived, two.survived)


# --- replay ---


def test_a_replay_runs_what_ran_whatever_the_clock_says(tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite([entry("first", seconds=0.1), entry("long", steps=100, seconds=1),
                   entry("short", breaks=7)])
    # it would take 100 times as long as the first
    monkeypatch.setattr(evaluation, "build_suite", lambda *_, **__: suite)
    options: dict[str, Any] = {"suite": "quick", "progress": False}
    one = qg.evaluate(Bright(), dim(60), Threat(eps=0.2), budget=6.0, **options)
    assert one.skipped == ("long",)
    one.save(tmp_path / "one.json")
    two = qg.evaluate(Bright(), dim(90), Threat(eps=0.7), seed=9, progress=False,
                      replay=Evaluation.load(tmp_path / "one.json"))
    assert labels(two) == labels(one) and np.array_equal(two.survived, one.survived)
    assert (two.threat, two.seed, two.images) == (one.threat, one.seed, 60)
    assert two.skipped == one.skipped and two.verdict == one.verdict != "resolved"
    other = DataLoader(TensorDataset(torch.full((60, 1, 4, 4), 0.4), torch.zeros(60).long()))
    with pytest.raises(DataError, match="not the images"):
        qg.evaluate(Bright(), other, replay=one, progress=False)
    suite.entries[0] = entry("renamed", seconds=0.1)
    with pytest.raises(SpecError, match="ran first, which its suite does not have"):
        qg.evaluate(Bright(), dim(60), replay=one, progress=False)


@pytest.mark.slow
def test_a_real_suite_replayed_gives_the_same_masks(quantized: nn.Module, digits: Digits,
                                                    tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(digits[0][:40], digits[1][:40]), batch_size=16)
    one = qg.evaluate(quantized, loader, Threat(eps=0.1), suite="quick", progress=False, seed=3)
    one.save(tmp_path / "one.json")
    two = qg.evaluate(quantized, loader, progress=False,
                      replay=Evaluation.load(tmp_path / "one.json"))
    assert labels(one) == labels(two) and one.curve == two.curve and one.flags == two.flags
    for a, b in zip(one.attacks, two.attacks, strict=True):
        assert np.array_equal(a.broke, b.broke) and a.settings == b.settings


@pytest.mark.parametrize("text", ["", "[1]", '{"format": 9}', None])
def test_what_is_no_evaluation_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "e.json").write_text(text)
    with pytest.raises(DataError):
        Evaluation.load(tmp_path / "e.json")


# --- order ---


def test_the_surrogate_that_tells_most_climbs_first() -> None:
    def order(**fidelity: float) -> list[str]:
        known = {name.replace("_", " "): v for name, v in fidelity.items()}
        entries = build_suite("standard", Threat(), seed=0, quantized=True, fidelity=known).entries
        return list(dict.fromkeys(e.group for e in entries if e.group in ("modes", "twin")))
    assert order(ramp=0.9, twin_k_8=0.1) == ["modes", "twin"]
    assert order(ramp=0.1, twin_k_8=0.9) == ["twin", "modes"]


def test_reseeded_runs_attack_the_same_few_survivors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_RESEEDED", 20)
    again = [entry(f"again {i}", "reseeded", breaks=i) for i in range(3)]
    result = run(Suite([entry("first", breaks=5)], reseeded=again), monkeypatch)
    rows = [set(np.flatnonzero(a.attacked)) for a in result.attacks[1:]]
    assert rows[:3] == [set(range(5, 25))] * 3
    # they broke something there, so that the others meet them, too
    assert labels(result)[4:] == [f"again {i}, the others" for i in range(3)]
    assert rows[3:5] == [set(range(25, 60))] * 2 and rows[5] == set(range(26, 60))
    assert int(result.survived.sum()) == 60 - 5 - 2 - 3
    flag = {f.name: f for f in result.flags}["another seed breaks more"]
    assert flag.reason.startswith("Of 20 images that stood, exactly one of 3 reseeded runs broke 1")


def test_the_others_are_spared_where_no_seed_broke_anything(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_RESEEDED", 20)
    result = run(Suite([entry("first")], reseeded=[entry("again", "reseeded")]), monkeypatch)
    assert labels(result) == ["first", "again"]


def test_a_budget_goes_to_what_climbs_before_what_is_blind(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite([entry("first", seconds=0.1), entry("twin", "twin", seconds=0.1)],
                  blind=[entry("Square", "query", seconds=3.0, steps=3000)])
    result = run(suite, monkeypatch, 60, budget=6.0)
    assert labels(result) == ["first", "twin"] and result.skipped == ("Square",)


def test_a_run_that_had_its_time_does_no_more_when_it_is_repeated(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    suite = Suite([entry(f"attack {i}", seconds=0.9) for i in range(6)])
    ran = [labels(run(suite, monkeypatch, 60, budget=3.0, run_dir=tmp_path)) for _ in range(3)]
    assert ran[0] == ran[1] == ran[2] and 0 < len(ran[0]) < 6
    more = labels(run(suite, monkeypatch, 60, budget=60.0, run_dir=tmp_path))
    assert more == [f"attack {i}" for i in range(6)]


# --- curve ---


@pytest.mark.slow
def test_accuracy_falls_from_clean_to_nothing(cnn: nn.Module, quantized: nn.Module,
                                              digits: Digits) -> None:
    loader = DataLoader(TensorDataset(digits[0][:60], digits[1][:60]), batch_size=60)
    for model in (cnn, quantized):
        result = qg.evaluate(model, loader, Threat(eps=0.1), suite="quick", progress=False)
        standing = [point.standing for point in result.curve]
        assert standing == sorted(standing, reverse=True) and standing[-1] == 0
        assert standing[0] == int(result.correct.sum())
        at = {point.eps: point.standing for point in result.curve}
        assert list(at)[:4] == [0.0, 0.025, 0.05, 0.1] and at[0.1] == int(result.survived.sum())
        assert "Accuracy over eps" in str(result) and "<svg" in result._repr_html_()


def test_what_the_curve_breaks_within_the_threat_counts(quantized: nn.Module, digits: Digits,
                                                        monkeypatch: pytest.MonkeyPatch,
                                                        tmp_path: Path) -> None:
    # a suite that breaks nothing, as under a small budget: the curve's own attack does
    suite = Suite([entry("first", breaks=2)], curve=40)
    monkeypatch.setattr(evaluation, "build_suite", lambda *_, **__: suite)
    loader = DataLoader(TensorDataset(digits[0][:60], digits[1][:60]), batch_size=30)

    def measured(**options: Any) -> Evaluation:
        return qg.evaluate(quantized, loader, Threat(eps=0.15), suite=suite.entries,
                           progress=False, **options)
    result = measured(run_dir=tmp_path)
    last = result.attacks[-1]
    assert last.label == curve.LABEL and last.broke[:40].sum() > 10 and last.broke[40:].any()
    at = {point.eps: point.standing for point in result.curve}
    assert int(result.survived.sum()) == at[0.15]
    # and what is handed out as having broken an image has
    x = torch.from_numpy(result.adversarials)
    broken = result.correct & ~result.survived
    with torch.no_grad():
        wrong = (quantized(x).argmax(1) != digits[1][:60]).numpy()
    assert wrong[broken & last.broke].all()
    assert (x - digits[0][:60]).abs().max() <= 0.15 + 1e-6
    # read again, and run again, it is the same
    for other in (measured(run_dir=tmp_path),
                  measured(replay=Evaluation.from_dict(result.to_dict()))):
        assert np.array_equal(other.survived, result.survived) and labels(other) == labels(result)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_curve_ends_where_any_pixel_may_take_any_value(norm: str,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve, "_broken", lambda *a: np.zeros(a[6], dtype=bool))
    loader = dim(10)
    result = qg.evaluate(Bright(), loader, Threat(norm, 0.01), suite="quick", progress=False,
                         images=10)
    assert result.curve[-1].eps == pytest.approx(1.0 if norm == "linf" else 4.0)


def test_an_attack_that_loses_its_way_at_large_eps_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> np.ndarray:
        return np.arange(args[6]) < (40 if args[7] < 0.2 else 0)
    monkeypatch.setattr(curve, "_broken", broken)
    result = qg.evaluate(Bright(), dim(60), Threat(eps=0.01), suite="quick", progress=False)
    flag = {f.name: f for f in result.flags}["not monotone in eps"]
    assert flag.raised and flag.value > 0


def test_what_is_asked_is_counted_in_a_last_batch_too(
        cnn: nn.Module, digits: Digits) -> None:
    loader = DataLoader(TensorDataset(digits[0][:70], digits[1][:70]), batch_size=70)
    suite = [Entry("PGD", PGD("ce", 3, norm="linf"), "pgd")]
    result = qg.evaluate(cnn, loader, Threat(eps=1e-4), suite=suite, progress=False)
    n = int(result.correct.sum())
    assert n == int(result.survived.sum()) > 64  # two batches of 64
    assert abs(result.attacks[0].gradients - 3 * n) <= 1
    assert abs(result.attacks[0].queries - 4 * n) <= 1


def test_one_image_alone_does_not_meet_a_forward_that_squeezes(
        cnn: nn.Module, digits: Digits) -> None:
    class Squeezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = cnn

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).squeeze()  # type: ignore[no-any-return]

    right = (cnn(digits[0]).argmax(1) == digits[1]).nonzero().flatten()[:65]
    loader = [(digits[0][right], digits[1][right])]
    suite = [Entry("PGD", PGD("ce", 3), "pgd"), Entry("Square", Square(20), "black-box")]
    result = qg.evaluate(Squeezing(), loader, Threat(eps=1e-4), suite=suite, progress=False)
    assert result.survived.all() and result.attacks[0].gradients == 3 * 65
