"""All flags of an evaluation: checks of the model, and comparisons of what its attacks broke."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..attacks.predictions import batches
from ..attacks.suites import GRADIENT_FREE
from . import attack_flags, model_flags
from .attack_result import AttackResult
from .fidelity import ITSELF
from .flags import Flag
from .model_checks import (
    CHECKED_IMAGES,
    UNBOUNDED_STEPS,
    count_one_class_alone,
    count_unbounded_survivors,
    count_unsteady,
    count_zero_gradients,
)
from .task import EvaluationTask
from .time_limit import Budget


def all_flags(task: EvaluationTask, survived: np.ndarray, certified: np.ndarray,
              results: Iterable[AttackResult], rounds: int, curve_masks: Sequence[np.ndarray],
              budget: Budget, fidelity: Mapping[str, float]) -> tuple[Flag, ...]:
    """Return the flags of the model and of its evaluation.

    Args:
        task: model, images and threat.
        survived: (N,) images that survive every attack.
        certified: (N,) images that no attack can break: an attack that does not is not in doubt.
        results: of all attacks.
        rounds: the most rounds of escalation that could have run.
        curve_masks: (n,) images that the curve's attack broke at each eps, ascending.
        budget: survivors that there is no time to check are listed in it.
        fidelity: see :func:`quantguard.evaluation.fidelity.fidelity`.
    """
    model, pixels = task.model, task.images.pixels
    unsteady, batch_dependent = count_unsteady(model, pixels, task.batch)
    checked = min(len(pixels), CHECKED_IMAGES)
    flags = [
        model_flags.softmax_outputs(model.probabilities),
        *flags_of_attacks(list(results), task.correct, survived, certified, model.quantized,
                          rounds),
        model_flags.gradient_misleads(fidelity.get(ITSELF, fidelity.get("gradient")),
                                      ITSELF in fidelity),
        model_flags.random_forward(unsteady, checked),
        model_flags.depends_on_its_batch(batch_dependent, checked),
        model_flags.one_class_alone(count_one_class_alone(model, pixels, task.batch), checked)]
    if curve_masks:
        flags.append(attack_flags.not_monotone(
            sum(int((less & ~more).sum()) for less, more in itertools.pairwise(curve_masks)),
            (len(curve_masks) - 1) * int(task.correct[:len(curve_masks[0])].sum())))
    open_rows = np.flatnonzero(survived & ~certified)
    for name, count, flag, each in (
            ("zero input gradients", count_zero_gradients, model_flags.zero_gradients,
             2 * budget.gradient),
            ("survives without bounds", count_unbounded_survivors,
             model_flags.survives_without_bounds, UNBOUNDED_STEPS * budget.step)):
        rows = open_rows[:budget.fitting(name, len(open_rows), each)]
        flags.append(flag(sum(count(model, x, y, size, task.threat, task.seed) for x, y, size
                              in batches(pixels, task.images.labels, rows, task.batch)),
                          len(rows)))
    return tuple(flags)


def flags_of_attacks(results: Sequence[AttackResult], correct: np.ndarray, survived: np.ndarray,
                     certified: np.ndarray, quantized: bool, rounds: int) -> tuple[Flag, ...]:
    """Return the flags that compare what the attacks broke.

    Args:
        results: of all attacks; those that raised an error are not compared.
        correct: (N,) images that are classified correctly without an attack.
        survived: (N,) images that survive every attack.
        certified: (N,) images that no attack can break.
        quantized: whether the model has quantized activations.
        rounds: the most rounds of escalation that could have run.
    """
    results = [r for r in results if r.error is None]
    by_group: dict[str, np.ndarray] = {}
    for result in results:
        before = by_group.get(result.group, np.zeros(len(correct), dtype=bool))
        by_group[result.group] = before | result.broken
    flags = [*_flags_of_default_attacks(results, by_group, correct, survived, quantized),
             *_flags_of_losses(results, len(correct)),
             *_flags_of_gradient_free(results, by_group, correct, certified),
             attack_flags.deciding_attack_missing(quantized, set(by_group))]
    if rounds:
        broken_by = [int(r.broken.sum()) for r in results if r.group == "escalation"]
        flags.append(attack_flags.escalation_still_pays(broken_by, rounds, len(correct)))
    reseeded = [r for r in results if r.group == "reseeded"]
    if reseeded:
        times = np.sum([r.broken for r in reseeded], axis=0)
        flags.append(attack_flags.another_seed_breaks_more(
            int((times == 1).sum()), len(reseeded), int(reseeded[0].attacked.sum())))
    if certified.any():
        flags.append(attack_flags.certificate_broken(int((certified & ~survived).sum()),
                                                     int(certified.sum())))
    return tuple(flags)


def _ran_on_all(result: AttackResult, correct: np.ndarray) -> bool:
    """Return whether an attack ran on every correct image."""
    return bool((result.attacked | ~correct).all())


def _flags_of_default_attacks(results: Sequence[AttackResult], by_group: Mapping[str, np.ndarray],
                              correct: np.ndarray, survived: np.ndarray,
                              quantized: bool) -> list[Flag]:
    """Return the flags that compare FGSM and PGD with each other and with all attacks."""
    if "pgd" not in by_group:
        return []
    n, none = len(correct), np.zeros(len(correct), dtype=bool)
    rest = correct & ~by_group["pgd"] & ~by_group.get("fgsm", none)
    flags = [attack_flags.default_attacks_overstate(int((rest & ~survived).sum()), n,
                                                    int(survived.sum()))]
    if "fgsm" in by_group and any(r.group == "pgd" and _ran_on_all(r, correct) for r in results):
        one, many = by_group["fgsm"], by_group["pgd"]
        flags.append(attack_flags.one_step_beats_many(int((one & ~many).sum()),
                                                      int((many & ~one).sum()), n))
    if quantized and "modes" in by_group:
        others = by_group["modes"] | by_group.get("softened", none)
        flags.append(attack_flags.backward_modes_disagree(int((rest & others).sum()), n))
    return flags


def _flags_of_losses(results: Sequence[AttackResult], n: int) -> list[Flag]:
    """Return the flag that compares PGD on the logits with PGD on rescaled logits."""
    losses = {r.settings["loss"]: r.broken for r in results if r.settings.get("everywhere")
              and r.settings.get("loss") in ("ce", "scaled") and r.group in ("pgd", "scaled")}
    if len(losses) < 2:
        return []
    plain, scaled = losses["ce"], losses["scaled"]
    return [attack_flags.saturated_logits(int((scaled & ~plain).sum()),
                                          int((plain & ~scaled).sum()), n)]


def _flags_of_gradient_free(results: Sequence[AttackResult], by_group: Mapping[str, np.ndarray],
                            correct: np.ndarray, certified: np.ndarray) -> list[Flag]:
    """Return the flags of gradient-free attacks that break what white-box attacks do not.

    Until one white-box attack has run on all images, there is nothing to compare with.
    """
    if not any(r.group not in GRADIENT_FREE and _ran_on_all(r, correct) for r in results):
        return []
    survivors = correct & ~certified
    for group, broken in by_group.items():
        if group not in GRADIENT_FREE:
            survivors = survivors & ~broken
    return [attack_flags.gradient_free_beats_white_box(
                name, int((by_group[name] & survivors).sum()), int(survivors.sum()))
            for name in GRADIENT_FREE if name in by_group]
