"""Run one attack on images and judge its adversarials by the model itself."""

from __future__ import annotations

import time

import numpy as np
import torch

from ..attacks import Entry, FoolboxModel, PixelModel, Substitute
from ..attacks.base import fb
from ..attacks.losses import fools, margin, project
from ..attacks.predictions import padded
from ..core.distributed import distributed
from ..core.progress import Progress
from .attack_result import AttackResult
from .evaluation_state import EvaluationState
from .task import EvaluationTask


class _Tally:
    """What an attack has done so far, in this process.

    Attributes:
        broken: (N,) images that it broke.
        done: (N,) images that it has finished.
        norms: (N,) norms that a minimum-norm attack found by its own measure.
        own: images that a minimum-norm attack broke by its own measure.
        passes: images passed forward, and images passed forward and backward.
        minimum_norm: whether it is a minimum-norm attack.
    """

    def __init__(self, n: int) -> None:
        self.begin, self.own, self.minimum_norm = time.monotonic(), 0, False
        self.broken, self.done = np.zeros((2, n), dtype=bool)
        self.norms, self.passes = np.full(n, np.nan), np.zeros(2)


def run_attack(task: EvaluationTask, entry: Entry, mask: np.ndarray, state: EvaluationState,
               bar: Progress, tolerant: bool) -> AttackResult:
    """Run one attack on the images of a mask and judge what it returns.

    Args:
        task: model, images and threat.
        entry: the attack.
        mask: (N,) images to attack.
        state: adversarials and margins are updated.
        bar: shows progress.
        tolerant: whether an attack that raises an error ends with what it broke before; otherwise
            the error is raised.
    """
    processes, error = distributed(), ""
    tally = _Tally(len(mask))
    try:
        _run(task, entry, mask, state, bar, tally)
    except Exception as raised:
        if not tolerant:
            raise
        error = f"{type(raised).__name__}: {(str(raised).splitlines() or [''])[0]}".strip(": ")
    if processes.total_of(float(bool(error))):
        error = error or "failed in another process"
    broken, norms = (processes.joined(v, tally.done) for v in (tally.broken, tally.norms))
    state.adversarials = processes.joined(state.adversarials, tally.done)
    state.margins = processes.joined(state.margins, tally.done)
    own = round(processes.total_of(tally.own))
    queries, gradients = (round(processes.total_of(count)) for count in tally.passes.tolist())
    norms = norms[np.isfinite(norms)]
    attacked = processes.joined(tally.done, tally.done) if error else mask.copy()
    return AttackResult(entry.settings(), attacked, broken, own if tally.minimum_norm else None,
                        float(np.median(norms)) if len(norms) else None, queries, gradients,
                        time.monotonic() - tally.begin, error or None)


def _run(task: EvaluationTask, entry: Entry, mask: np.ndarray, state: EvaluationState,
         bar: Progress, tally: _Tally) -> None:
    """Run one attack batch by batch and record in tally what it did."""
    model, threat, data = task.model, task.threat, task.images
    fmodel = FoolboxModel(model, threat)
    before = _passes(model)
    if isinstance(entry.attack, Substitute) and mask.any():
        entry.attack.fit(fmodel, data.pixels)
    tally.passes = (_passes(model) - before) * distributed().is_main
    tally.minimum_norm = isinstance(entry.attack, fb.attacks.base.MinimizationAttack)
    chosen, processes = np.flatnonzero(mask), distributed()
    # processes share whole batches, so that each batch is the same as in one process
    for first in processes.shard(range(0, len(chosen), task.batch)):
        rows = chosen[first : first + task.batch]
        full = max(len(rows), 2)  # a model that squeezes axes of size 1 fails on a single image
        x, size = padded(data.pixels[rows], full)
        y, _ = padded(data.labels[rows], full)
        criterion = fb.criteria.Misclassification(y)
        before = _passes(model)
        if tally.minimum_norm:
            raw = entry.attack.run(fmodel, x, criterion)
            # Foolbox returns zeros for "none found", our attacks return the image.
            found = fools(model(raw), y) & (raw != 0).flatten(1).any(1)
            tally.own += int(found[:size].sum())
            norms = (raw - x)[:size].flatten(1).norm(dim=1)
            tally.norms[rows] = torch.where(found[:size], norms, torch.nan).cpu().numpy()
            raw = torch.where(found.reshape(-1, *[1] * (x.dim() - 1)), raw, x)
        else:
            options = {}
            if getattr(entry.attack, "restart", False):
                near = torch.from_numpy(state.adversarials[rows]).to(x)
                options["starting_points"] = padded(near, full)[0]
            with model.laid_out(x):
                raw = entry.attack.run(fmodel, x, criterion, epsilon=threat.eps, **options)
        tally.passes = tally.passes + (_passes(model) - before) * size // full
        raw = torch.where(raw.isfinite(), raw.detach(), x)
        raw, x, y = (padded(v, task.batch)[0] for v in (raw, x, y))
        trial = project(raw, x, threat.eps, threat.norm, threat.bounds)
        with torch.no_grad():
            logits = model(trial)
        fooled = fools(logits, y)[:size].cpu().numpy()
        tally.broken[rows], tally.done[rows] = fooled, True
        height = margin(logits, y)[:size].cpu().numpy()
        better = state.survived[rows] & (fooled | (height > state.margins[rows]))
        state.adversarials[rows[better]] = trial[:size].cpu().numpy()[better]
        state.margins[rows[better]] = height[better]
        survivors = int((state.survived & ~tally.broken).sum())
        bar.advance(entry.cost * size * processes.size,
                    f"{entry.label}, {survivors} of {len(mask)} survive")


def _passes(model: PixelModel) -> np.ndarray:
    """Return how many images have passed the model forward, and forward and backward."""
    return np.array([model.queries, model.gradients])
