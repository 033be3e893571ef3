"""Measure robustness: the share of images that survive every attack of a suite.

Every attacked figure is an upper bound of the truth; its interval covers the sampling of images
only. No attack's own success counts: each adversarial is clipped to the threat and predicted again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..attacks import Entry, build_suite
from ..attacks.suites import check_suite, listed
from ..certification.certifier import certificate_of
from ..core.distributed import distributed
from ..core.errors import Interrupted, SpecError
from ..core.metadata import resolved
from ..core.module_utils import check_model, check_numbers, ordinary
from ..core.nested_tensors import device_of
from ..core.progress import Progress
from ..core.run_dir import locked
from ..core.runtime import entry_point, environment, measuring, seconds_of, usable_device
from ..core.specs import Threat, check_seed, plain
from ..data.images import warn_if_sorted
from .attack_flags import attacks_failed, attacks_left_out
from .attack_result import AttackResult
from .diagnostics import all_flags, flags_of_attacks
from .eps_curve import Curve, accuracy_over_eps, curve_cost
from .evaluation_state import EvaluationState
from .fidelity import fidelity, fidelity_cost
from .flags import Flag
from .model_checks import saturated
from .preparation import (
    check_replayed_attacks,
    check_replayed_images,
    image_hash,
    prepare,
    settings_of,
)
from .results import Evaluation
from .suite_runner import SuiteRunner
from .task import EvaluationTask
from .time_limit import Budget, seconds_per_image

_GIVE_RUN_DIR = "With run_dir= (--run-dir DIR) an interrupted run can be resumed."


@entry_point
def evaluate(model: nn.Module, loader: Iterable[Any], threat: Threat | None = None, *,
             suite: str | Sequence[Any] = "standard", images: int | None = None,
             run_dir: str | os.PathLike[str] | None = None, seed: int = 0,
             device: str | torch.device | None = None, progress: bool = True,
             budget: float | str | None = None, certify: bool = False,
             replay: Evaluation | None = None) -> Evaluation:
    """Measure how many images survive every attack of a suite.

    Works on converted and on float models alike, and leaves no trace on them.

    Args:
        model: a classifier that returns logits.
        loader: re-iterable of (images, labels), or dicts with ``labels``.
        threat: norm, eps and bounds in pixel units; mean and std if the loader normalises. None:
            the model's own (``model.quantguard.threat``), which :func:`quantguard.harden` sets,
            else ``Threat()``. A threat without mean and std gets the model's.
        suite: ``quick``, ``standard``, ``full``, ``paper`` (the attacks tabled in
            arXiv:1807.06714), a list of ``foolbox.attacks.Attack``, or one of them. An attack of a
            list that raises an error is a row of its own with the error; the others count, and the
            verdict is *undecided*.
        images: how many images, the loader's first; None: all.
        run_dir: saves the state after every attack; the next run with it resumes from there.
        seed: of every random start.
        device: where to run; None: where the model is.
        progress: whether to show it.
        budget: time limit of the whole call, in seconds or as ``"90s"``, ``"5m"``, ``"2h"``:
            certificate, fidelity, attacks, accuracy over eps and checks. The model's speed is
            measured first; work that would not fit is left out and listed, and the verdict is then
            *undecided*. Predictions are always made, and a running attack is not cut short.
        certify: first find out which images no attack can break, as :func:`quantguard.certify`
            does, within a third of the budget. Only attacks that run on all correct images attack
            the certified ones, too.
        replay: an evaluation whose attacks are run again, on its images, under its threat and
            seed, whatever the clock says; threat, suite (unless it is a list), images, seed,
            budget and certify are ignored.

    Raises:
        DataError: images or labels that do not fit, or that differ from those of ``replay``.
        ConversionError: a model that returns no logits, or NaN, or that cannot be certified.
        SpecError: an unknown suite, a run_dir with other settings, a malformed budget, mean, std
            or bounds that contradict the model's own, a replay of attacks that the suite does not
            have, or a list of which every attack raised an error.

    Example:
        >>> evaluation = evaluate(model, loader, Threat(eps=8 / 255))  # doctest: +SKIP
        >>> evaluation.robust_accuracy, evaluation.conclusion  # doctest: +SKIP
    """
    if replay is not None:
        threat, seed, images, budget = replay.threat, replay.seed, replay.images, None
        suite = suite if replay.suite == "list" else replay.suite
        certify = replay.certificate is not None
    check_model(model)
    threat = resolved(model, threat, progress)
    check_seed(seed)
    seed, images = plain(seed), plain(images)
    suite = listed(suite)
    check_suite(suite)
    limit = None if budget is None else seconds_of(budget)
    check_numbers(model)
    model = ordinary(model)
    before, device = device_of(model), device or distributed().device
    if device is not None:
        model.to(usable_device(device))
    try:
        with locked(run_dir), measuring(model, seed):
            return _evaluate(model, loader, threat, suite, images, run_dir, seed, progress, limit,
                             certify, replay)
    except Interrupted:
        raise
    except KeyboardInterrupt:  # before the first attack
        raise Interrupted("interrupted after 0 of the attacks; nothing was saved",
                          fix=_GIVE_RUN_DIR) from None
    finally:
        if device is not None:
            model.to(before)


def _evaluate(model: nn.Module, loader: Iterable[Any], threat: Threat, suite: str | Sequence[Any],
              images: int | None, run_dir: str | os.PathLike[str] | None, seed: int,
              show: bool, limit: float | None, certify: bool,
              replay: Evaluation | None) -> Evaluation:
    """Evaluate a model in eval mode, with everything that :func:`evaluate` takes checked."""
    start, show = time.monotonic(), show and distributed().is_main
    budget = Budget(limit, start, None if replay is None else replay.skipped)
    task, logits = prepare(model, loader, threat, images, seed)
    pixel_model, data, correct = task.model, task.images, task.correct
    if not certify and replay is None:  # a certificate warns itself, and so did the replayed run
        warn_if_sorted(data, logits.shape[1])
    digest = image_hash(data)
    if replay is not None:
        check_replayed_images(replay, digest)
    certificate = None
    if certify:
        third = None if budget.limit is None else max(0.0, budget.left / 3)
        certificate = certificate_of(model, data, threat, limit=third, run_dir=run_dir, show=show)
    certified = np.zeros_like(correct) if certificate is None else certificate.certified
    if budget.limit is not None:
        forward, gradient = distributed().agreed(seconds_per_image(
            pixel_model, data.pixels[:task.batch], data.labels[:task.batch]))
        budget.set_speed(forward, gradient, softened=pixel_model.quantized)
    options: dict[str, Any] = {"seed": seed, "quantized": pixel_model.quantized,
                               "saturated": saturated(logits, data.labels)}
    planned = build_suite(suite, threat, **options)  # for the ETA; fidelity orders the attacks
    certain = [*planned.entries, *planned.reseeded, *planned.gradient_free]
    bar = _progress(task, certain, bool(planned.curve), show, budget)
    fidelities = fidelity(task, budget)
    bar.advance(fidelity_cost(data, correct), "fidelity measured")
    chosen = build_suite(suite, threat, fidelity=fidelities,
                         softenable=bool(pixel_model.softenable), **options)
    if replay is not None:
        check_replayed_attacks(replay, chosen)
    settings = settings_of(task, chosen, digest, logits, certified if certify else None)
    path = None
    if run_dir is not None:
        path = Path(run_dir) / "evaluation.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
    state = EvaluationState(path, settings, data, correct)
    done = len(state.results)
    if done:
        bar.say(f"resuming from {run_dir}, with {done} attack{'' if done == 1 else 's'} done")
    runner = SuiteRunner(task, certified, state, bar, budget,
                         None if replay is None else {
                             r.label: bool(r.settings["everywhere"]) for r in replay.attacks},
                         tolerant=not isinstance(suite, str))

    def result(flags: tuple[Flag, ...], curve: Curve) -> Evaluation:
        results, survived = _with_curve(curve, state)
        flags = (*flags, attacks_left_out(budget.skipped),
                 attacks_failed([r.label for r in results if r.error is not None]))
        return Evaluation(
            correct, survived, tuple(results), flags, _adversarials(task, state, curve, survived),
            data.labels.cpu().numpy(), threat, suite if isinstance(suite, str) else "list", seed,
            environment(data.pixels.device), digest, time.monotonic() - start, fidelities,
            curve.points, tuple(budget.skipped), certificate, data.sample)
    try:
        runner.run(chosen)
        _check_not_all_failed(state.results)
        curve = accuracy_over_eps(task, state.survived, chosen.curve, budget, bar)
        results, survived = _with_curve(curve, state)
        flags = all_flags(task, survived, certified, results, len(chosen.rounds),
                          list(curve.masks), budget, fidelities)
    except KeyboardInterrupt:
        bar.close()
        total = f"{len(certain)} attacks" + (" or more" if chosen.rounds else "")
        what = f"interrupted after {len(state.results)} of {total}"
        if path is None:
            raise Interrupted(f"{what}; nothing was saved", fix=_GIVE_RUN_DIR) from None
        ran = {r.label for r in state.results}
        budget.skipped = [e.label for e in (*certain, *chosen.searches) if e.label not in ran]
        partial = path.with_name("partial.json")
        result(flags_of_attacks(state.results, correct, state.survived, certified,
                                pixel_model.quantized, 0), Curve()).save(partial)
        raise Interrupted(f"{what}; saved in {path.parent}, the result so far in {partial.name}",
                          fix="Run the same command again to resume.") from None
    bar.close()
    return result(flags, curve)


def _progress(task: EvaluationTask, entries: Sequence[Entry], curve: bool, show: bool,
              budget: Budget) -> Progress:
    """Return a progress bar for fidelity, the attacks that surely run, and the curve."""
    correct = int(task.correct.sum())
    work = fidelity_cost(task.images, task.correct) + sum(e.cost for e in entries) * correct
    return Progress("evaluate", work + (curve_cost(correct) if curve else 0.0), show,
                    deadline=budget.deadline)


def _check_not_all_failed(results: Sequence[AttackResult]) -> None:
    """Check that at least one attack ran to its end.

    Raises:
        SpecError: every attack raised an error.
    """
    if results and all(result.error is not None for result in results):
        raise SpecError(f"{results[0].label} failed: {results[0].error}",
                        why="Every attack of the suite raised an error, so there is no figure.",
                        fix="Check what the attack needs, or add other attacks.")


def _with_curve(curve: Curve, state: EvaluationState) -> tuple[list[AttackResult], np.ndarray]:
    """Return the results and survivors of all attacks, with the curve's own."""
    if curve.result is None:
        return state.results, state.survived
    return [*state.results, curve.result], state.survived & ~curve.result.broken


def _adversarials(task: EvaluationTask, state: EvaluationState, curve: Curve,
                  survived: np.ndarray) -> np.ndarray:
    """Return what broke each image; survivors are unchanged."""
    pixels = task.images.pixels.cpu().numpy()
    broken = (task.correct & ~state.survived).reshape(-1, *[1] * (pixels.ndim - 1))
    adversarials = np.where(broken, state.adversarials, pixels)
    for row in np.flatnonzero(state.survived & ~survived):
        adversarials[row] = curve.adversarials[int(row)]
    return adversarials
