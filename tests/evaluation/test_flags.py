"""Intervals and tests against scipy, and the thresholds of each flag."""

from __future__ import annotations

import math

import pytest
from scipy.stats import binomtest

from quantguard.core.statistics import clopper_pearson, mcnemar, wilson
from quantguard.evaluation import attack_flags
from quantguard.evaluation.attack_flags import (
    default_attacks_overstate,
    gradient_free_beats_white_box,
    one_step_beats_many,
)
from quantguard.evaluation.flags import Flag, verdict
from quantguard.evaluation.model_flags import zero_gradients

COUNTS = [(k, n) for n in (1, 2, 7, 100, 1000) for k in sorted({0, 1, n // 3, n // 2, n - 1, n})]


@pytest.mark.parametrize(("k", "n"), [*COUNTS, (3, 50_000), (49_999, 50_000)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_reaches_0_and_1_exactly_and_is_0_to_1_without_images() -> None:
    assert wilson(0, 30)[0] == 0.0 and wilson(30, 30)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("first", "second"), [
    (0, 1), (1, 0), (5, 0), (6, 0), (3, 3), (10, 25), (0, 60), (700, 500), (4000, 1000)])
def test_mcnemar_is_the_exact_sign_test(first: int, second: int) -> None:
    assert mcnemar(first, second) == pytest.approx(binomtest(first, first + second).pvalue,
                                                   rel=1e-9)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_mcnemar_of_no_difference_is_1() -> None:
    assert mcnemar(0, 0) == 1.0


@pytest.mark.parametrize(("k", "n"), [*COUNTS, (12, 20_000)])
@pytest.mark.parametrize("level", [0.95, 0.99])
def test_clopper_pearson_is_scipys_pair_of_one_sided_bounds(k: int, n: int, level: float) -> None:
    low = binomtest(k, n, alternative="greater").proportion_ci(level, method="exact").low
    high = binomtest(k, n, alternative="less").proportion_ci(level, method="exact").high
    assert clopper_pearson(k, n, level) == pytest.approx((low, high), abs=1e-9)


def state(flag: Flag) -> str:
    return flag.kind if flag.raised else "clear"


# 95 % one-sided: 148 clean images leave an upper bound of 2.004 %, 149 one of 1.991 %.
@pytest.mark.parametrize(("zeros", "n", "expected"), [
    (0, 0, "clear"), (0, 1, "undecided"), (0, 148, "undecided"), (0, 149, "clear"),
    (1, 149, "undecided"), (1, 5, "unresolved"), (1, 6, "undecided"), (2, 35, "unresolved"),
    (2, 36, "undecided"), (40, 40, "unresolved"), (500, 50_000, "clear"),
    (700, 50_000, "unresolved")])
def test_zero_gradients_are_flagged_above_one_per_cent(zeros: int, n: int, expected: str) -> None:
    assert state(zero_gradients(zeros, n)) == expected


@pytest.mark.parametrize(("broken", "survivors", "expected"), [
    (0, 0, "clear"), (0, 148, "undecided"), (0, 149, "clear"), (1, 10, "unresolved"),
    (1, 11, "undecided"), (1, 250, "clear"), (400, 50_000, "unresolved")])
@pytest.mark.parametrize("name", ["noise", "transfer"])
def test_gradient_free_attacks_are_flagged_above_half_a_per_cent(
        name: str, broken: int, survivors: int, expected: str) -> None:
    flag = gradient_free_beats_white_box(name, broken, survivors)
    assert state(flag) == expected
    assert name in flag.name


@pytest.mark.parametrize(("zeros", "n"), [(0, 148), (0, 149), (1, 5), (1, 6), (7, 400), (90, 9000)])
def test_a_share_flag_is_what_scipys_bounds_say(zeros: int, n: int) -> None:
    low = binomtest(zeros, n, alternative="greater").proportion_ci(0.95, method="exact").low
    high = binomtest(zeros, n, alternative="less").proportion_ci(0.95, method="exact").high
    expected = "unresolved" if low > 0.01 else "clear" if high < 0.02 else "undecided"
    assert state(zero_gradients(zeros, n)) == expected


@pytest.mark.parametrize(("more", "n", "raised"), [
    (0, 500, False), (7, 350, False), (8, 400, True), (8, 401, False), (9, 100, True),
    (5, 20, False), (0, 0, False)])
def test_overstated_needs_two_points_and_significance(more: int, n: int, raised: bool) -> None:
    assert mcnemar(7, 0) > 0.01 > mcnemar(8, 0)
    flag = default_attacks_overstate(more, n, survivors=n // 4)
    assert (flag.raised, flag.kind) == (raised, "masked")
    assert f"{n // 4 + more} of {n}" in flag.reason


@pytest.mark.parametrize(("one", "many", "raised"), [
    (0, 0, False), (7, 0, False), (8, 0, True), (0, 8, False), (30, 30, False), (30, 10, True),
    (20, 10, False)])
def test_one_step_beats_many_only_when_significant(one: int, many: int, raised: bool) -> None:
    flag = one_step_beats_many(one, many, 100)
    assert (flag.raised, flag.kind) == (raised, "unresolved")
    assert flag.value == one - many


def test_verdict_is_the_worst_raised_flag_and_masked_changes_nothing() -> None:
    masked = default_attacks_overstate(50, 100, 10)
    undecided, unresolved = zero_gradients(0, 9), zero_gradients(9, 9)
    clear = zero_gradients(0, 900)
    assert masked.raised and verdict((masked, clear)) == "resolved"
    assert verdict(()) == "resolved"
    assert verdict((undecided, masked)) == "undecided"
    assert verdict((undecided, unresolved, clear)) == "unresolved"


def test_every_flag_carries_figure_threshold_test_and_reason() -> None:
    for flag in (default_attacks_overstate(3, 100, 10), zero_gradients(3, 100),
                 one_step_beats_many(3, 1, 100),
                 gradient_free_beats_white_box("noise", 3, 100)):
        assert math.isfinite(flag.value) and math.isfinite(flag.threshold)
        assert flag.test and flag.reason


@pytest.mark.parametrize(("once", "n", "state"), [
    (0, 128, "clear"), (1, 128, "clear"), (0, 20, "undecided"), (9, 128, "undecided"),
    (30, 128, "unresolved"), (0, 0, "clear")])
def test_another_seed_breaks_more_if_single_runs_break_what_no_other_did(once: int, n: int,
                                                                         state: str) -> None:
    flag = attack_flags.another_seed_breaks_more(once, 5, n)
    assert (flag.kind if flag.raised else "clear") == state
    assert flag.value == pytest.approx(100 * once / 5 / max(n, 1))


def test_attacks_left_out_are_flagged() -> None:
    assert not attack_flags.attacks_left_out(()).raised
    flag = attack_flags.attacks_left_out(("A", "B"))
    assert flag.raised and flag.kind == "undecided" and "A, B" in flag.reason


@pytest.mark.parametrize(("quantized", "groups", "raised"), [
    (True, {"pgd", "noise"}, True), (True, {"softened"}, False), (False, {"noise", "cw"}, True),
    (False, {"pgd"}, False), (False, set(), True)])
def test_a_suite_without_the_attack_that_decides_is_undecided(quantized: bool, groups: set[str],
                                                              raised: bool) -> None:
    flag = attack_flags.deciding_attack_missing(quantized, groups)
    assert flag.raised is raised and flag.kind == "undecided"
    assert verdict((flag,)) == ("undecided" if raised else "resolved")
