"""Transfer attacks in a comparison: the adversarials of each model are tried on the others."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from ..attacks import PixelModel
from ..attacks.losses import fools
from ..attacks.predictions import predict
from ..core.module_utils import evaluating, frozen
from ..core.nested_tensors import device_of
from ..data.images import batch_size
from .attack_result import AttackResult
from .diagnostics import flags_of_attacks
from .results import Evaluation


def transferred(models: Mapping[str, nn.Module], rows: Mapping[str, Evaluation],
            key: str | None) -> dict[str, Evaluation]:
    """Return the evaluations after the adversarials of each model were tried on the others.

    Args:
        models: by name.
        rows: their evaluations, on the same images under the same threat.
        key: the models' keyword for images; None: their first argument.
    """
    found = {}
    for name, model in models.items():
        result = rows[name]
        with evaluating(model), frozen(model):
            pixel_model = PixelModel(model, result.threat, key)
            pixel_model.probabilities = any(f.name == "softmax outputs" and f.raised
                                            for f in result.flags)
            for other, theirs in rows.items():
                if other != name:
                    result = _with_transfer(pixel_model, result, other, theirs)
        found[name] = result
    return found


def _with_transfer(model: PixelModel, result: Evaluation, other: str,
                   theirs: Evaluation) -> Evaluation:
    """Return an evaluation with one more attack: the adversarials of another model."""
    begin, before = time.monotonic(), model.queries
    attacked = result.survived & theirs.correct & ~theirs.survived
    if result.adversarials is None or theirs.adversarials is None or not attacked.any():
        return result
    x = torch.from_numpy(theirs.adversarials[attacked]).to(device_of(model))
    y = torch.from_numpy(result.labels[attacked]).to(x.device)
    fooled = fools(predict(model, x, batch_size(x, result.images), attacked=True), y)
    broken = np.zeros(result.images, dtype=bool)
    broken[np.flatnonzero(attacked)] = fooled.cpu().numpy()
    attack = AttackResult({"label": f"transfer from {other}", "class": "transferred",
                           "group": "transfer", "everywhere": False},
                          attacked, broken, None, None, model.queries - before, 0,
                          time.monotonic() - begin)
    attacks, survived = (*result.attacks, attack), result.survived & ~broken
    adversarials = result.adversarials.copy()
    adversarials[broken] = theirs.adversarials[broken]
    changed = {flag.name: flag for flag in flags_of_attacks(
        attacks, result.correct, survived, result.certified, model.quantized, 0)}
    flags = tuple(changed.pop(flag.name, flag) for flag in result.flags)
    curve = tuple(point if point.eps < result.threat.eps else dataclasses.replace(
        point, survivors=min(point.survivors, int(survived.sum()))) for point in result.curve)
    return dataclasses.replace(result, survived=survived, attacks=attacks, curve=curve,
                               flags=(*flags, *changed.values()), adversarials=adversarials)
