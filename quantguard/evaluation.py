"""Measure robustness: the share of images that survive every attack of a suite.

Every attacked figure is an upper bound of the truth; its interval covers the sampling of images
only. No attack is believed: each adversarial is clipped to the threat again and predicted again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import masking
from .attacks import PixelModel, build_suite
from .attacks.losses import fools
from .attacks.suites import check_suite, listed
from .batches import check_labels
from .budget import Budget
from .certification import certificate_of
from .curve import LABEL, Curve, accuracy_over_eps, curve_cost
from .errors import DataError, Interrupted, SpecError
from .evidence import (
    all_flags,
    are_probabilities,
    fidelity,
    fidelity_cost,
    flags_of_attacks,
    pace,
    predict,
    saturated,
)
from .images import batch_size, gather, warn_if_sorted
from .keeping import locked
from .masking import Flag
from .metadata import check_classes, resolved
from .progress import Progress
from .results import AttackResult, Evaluation
from .running import (
    check_model,
    check_numbers,
    device_of,
    entry_point,
    environment,
    measuring,
    ordinary,
    seconds_of,
    usable_device,
)
from .schedule import OTHERS, Schedule, State
from .spec import Threat, check_seed, plain
from .world import world


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
        model: a classifier; what it returns is read as logits.
        loader: re-iterable of (images, labels), or dicts with ``labels``.
        threat: norm, eps and bounds in pixel units; mean and std where the loader normalises.
            None: the model's own (``model.quantguard.threat``), which :func:`quantguard.harden`
            sets, else ``Threat()``. One without mean and std gets the model's.
        suite: ``quick``, ``standard``, ``full``, ``paper`` (what arXiv:1807.06714 tables), or a
            list of ``foolbox.attacks.Attack``, or one of them. Of a list what raises is a row that
            says so, beside those of the others, and the verdict is *undecided*.
        images: how many images, the loader's first; None: all.
        run_dir: keeps the state after every attack; run again, it goes on from there.
        seed: of every random start.
        device: where to run; None: where the model is.
        progress: whether to show it.
        budget: seconds, or as in ``"90s"``, ``"5m"``, ``"2h"``, that the whole call may take:
            certificate, fidelity, attacks, accuracy over eps and checks. What does not fit, by the
            speed that is measured first, is left out and listed, and the verdict is *undecided*
            for it. Predictions are made whatever they take, and an attack that has begun is not
            cut short.
        certify: find out first which images no attack can break, as :func:`quantguard.certify`
            does, within a third of the budget. Only attacks that have a column of their own try
            their luck on those, too.
        replay: run the attacks that this evaluation ran, on its images, under its threat and seed,
            whatever the clock says; threat, suite, images, seed, budget and certify are not looked
            at.

    Raises:
        DataError: images or labels that do not fit, or other ones than ``replay`` had.
        ConversionError: a model that returns no logits, or NaN; or one that cannot be certified.
        SpecError: an unknown suite, a run_dir of other settings, a budget that is no time, mean,
            std or bounds that contradict the model's own, a replay of attacks that the suite does
            not have, or a list of which every attack raised.

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
    before, device = device_of(model), device or world().device
    if device is not None:
        model.to(usable_device(device))
    try:
        with locked(run_dir), measuring(model, seed):
            return _evaluate(model, loader, threat, suite, images, run_dir, seed, progress, limit,
                             certify, replay)
    except Interrupted:
        raise
    except KeyboardInterrupt:  # before the first attack
        raise Interrupted("interrupted after 0 of the attacks; nothing was kept",
                          fix="With run_dir= (--run-dir DIR) a run that is stopped later goes on "
                              "from where it stopped.") from None
    finally:
        if device is not None:
            model.to(before)


def _evaluate(model: nn.Module, loader: Iterable[Any], threat: Threat, suite: str | Sequence[Any],
              images: int | None, run_dir: str | os.PathLike[str] | None, seed: int,
              show: bool, budget: float | None, certify: bool,
              replay: Evaluation | None) -> Evaluation:
    start, show = time.monotonic(), show and world().first
    time_left = Budget(budget, start, None if replay is None else replay.skipped)
    data = gather(model, loader, threat, images)
    pixel_model = PixelModel(model, threat, data.key)
    batch = batch_size(data.pixels)
    logits = predict(pixel_model, data.pixels, batch)
    if are_probabilities(logits):
        pixel_model.probabilities = True
        logits = predict(pixel_model, data.pixels, batch)
    check_labels(data.labels, logits.shape[1], "the loader")
    check_classes(model, data.classes, logits.shape[1])
    if not certify and replay is None:  # which warn, or did
        warn_if_sorted(data, logits.shape[1])
    correct = (~fools(logits, data.labels)).cpu().numpy()
    digest = hashlib.blake2b(data.pixels.cpu().numpy().tobytes()
                             + data.labels.cpu().numpy().tobytes(), digest_size=16).hexdigest()
    if replay is not None and digest != replay.image_hash:
        raise DataError("these are not the images of the evaluation that is to be replayed",
                        fix="Give the same loader, in the same order.")
    certificate = None
    if certify:
        limit = None if time_left.limit is None else max(0.0, time_left.left / 3)
        certificate = certificate_of(model, data, threat, limit=limit, run_dir=run_dir, show=show)
    proven = np.zeros_like(correct) if certificate is None else certificate.certified
    if time_left.limit is not None:
        forward, gradient = world().agreed(
            pace(pixel_model, data.pixels[:batch], data.labels[:batch]))
        time_left.measured(forward, gradient, judged=pixel_model.quantized)
    options: dict[str, Any] = {"seed": seed, "quantized": pixel_model.quantized,
                               "saturated": saturated(logits, data.labels)}
    planned, right = build_suite(suite, threat, **options), int(correct.sum())
    certain = [*planned.entries, *planned.reseeded, *planned.blind]
    asked, drawn = fidelity_cost(data, correct), curve_cost(right) * bool(planned.curve)
    bar = Progress("evaluate", asked + sum(e.cost for e in certain) * right + drawn, show,
                   deadline=time_left.deadline)
    faithful = fidelity(pixel_model, data, correct, threat, batch, seed, time_left)
    bar.advance(asked, "fidelity measured")
    chosen = build_suite(suite, threat, fidelity=faithful, foreign=bool(pixel_model.foreign),
                         **options)
    if replay is not None:
        known = {e.label for e in chosen.every}
        known |= {LABEL, *(f"{label}{OTHERS}" for label in known)}
        gone = [r.label for r in replay.attacks if r.label not in known]
        if gone:
            raise SpecError(f"the evaluation that is to be replayed ran {gone[0]}"
                            + f" and {len(gone) - 1} more attacks" * (len(gone) > 1)
                            + ", which its suite does not have here",
                            why="It is another version's, a comparison's, or of other attacks.",
                            fix="Evaluate anew.")
    settings = {"threat": json.loads(json.dumps(threat.to_dict())), "seed": seed,
                "suite": [e.settings() for e in chosen.every], "images": digest,
                "predictions": hashlib.blake2b(logits.cpu().numpy().tobytes(),
                                               digest_size=16).hexdigest()}
    if certify:
        settings["certified"] = hashlib.blake2b(proven.tobytes(), digest_size=16).hexdigest()
    settings = json.loads(json.dumps(settings))
    path = None
    if run_dir is not None:
        path = Path(run_dir) / "evaluation.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
    state = State(path, settings, data, correct)
    ended = len(state.results)
    if ended:
        bar.say(f"going on from {run_dir}, where {ended} attack{'s' * (ended > 1)} had ended")
    schedule = Schedule(pixel_model, data, threat, batch, correct, proven, state, bar, time_left,
                        None if replay is None else {
                            r.label: bool(r.settings["everywhere"]) for r in replay.attacks},
                        forgiving=not isinstance(suite, str))

    def result(flags: tuple[Flag, ...], curve: Curve) -> Evaluation:
        broken = (correct & ~state.survived).reshape(-1, *[1] * (data.pixels.dim() - 1))
        adversarials = np.where(broken, state.adversarials, data.pixels.cpu().numpy())
        results, survived = _with(curve, state)
        for row in np.flatnonzero(state.survived & ~survived):
            adversarials[row] = curve.adversarials[int(row)]
        return Evaluation(
            correct, survived, tuple(results),
            (*flags, masking.left_out(time_left.skipped),
             masking.failed([r.label for r in results if r.error is not None])),
            adversarials, data.labels.cpu().numpy(), threat,
            suite if isinstance(suite, str) else "list", seed,
            environment(data.pixels.device), digest, time.monotonic() - start, faithful,
            curve.points, tuple(time_left.skipped), certificate, data.sample)
    try:
        schedule.run(chosen)
        _check_some_ended(state.results)
        curve = accuracy_over_eps(pixel_model, data, threat, batch, seed, correct,
                                  state.survived, chosen.curve, time_left, bar)
        results, survived = _with(curve, state)
        flags = all_flags(pixel_model, data, threat, batch, seed, correct, survived, proven,
                          results, len(chosen.rounds), list(curve.masks), time_left, faithful)
    except KeyboardInterrupt:
        bar.close()
        many = f"{len(certain)} attacks" + " or more" * bool(chosen.rounds)
        done = f"interrupted after {len(state.results)} of {many}"
        if path is None:
            raise Interrupted(f"{done}; nothing was kept", fix="With run_dir= (--run-dir DIR) the "
                              "next run goes on from where it stopped.") from None
        ran = {r.label for r in state.results}
        time_left.skipped = [e.label for e in (*certain, *chosen.searches) if e.label not in ran]
        partial = path.with_name("partial.json")
        result(flags_of_attacks(state.results, correct, state.survived, proven,
                                pixel_model.quantized, 0), Curve()).save(partial)
        raise Interrupted(f"{done}; saved in {path.parent}, what is known in {partial.name}",
                          fix="Run the same command again to go on.") from None
    bar.close()
    return result(flags, curve)


def _check_some_ended(results: Sequence[AttackResult]) -> None:
    """Refuse a figure that no attack has tried to lower.

    Raises:
        SpecError: every attack raised.
    """
    if results and all(result.error is not None for result in results):
        raise SpecError(f"{results[0].label} failed: {results[0].error}",
                        why="Every attack of the suite raised, so that there is no figure.",
                        fix="Look at what the attack needs, or give other attacks beside it.")


def _with(curve: Curve, state: State) -> tuple[list[AttackResult], np.ndarray]:
    """Return what all attacks did, and what survived them, that of the curve among them."""
    if curve.result is None:
        return state.results, state.survived
    return [*state.results, curve.result], state.survived & ~curve.result.broke
