"""What breaks one model of a comparison is tried on the others: a transfer that costs nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from .attacks import PixelModel
from .attacks.losses import fools
from .evidence import flags_of_attacks, predict
from .images import batch_size
from .results import AttackResult, Evaluation
from .running import device_of, evaluating, frozen


def crossed(models: Mapping[str, nn.Module], rows: Mapping[str, Evaluation],
            key: str | None) -> dict[str, Evaluation]:
    """Return the evaluations after each model has met what broke the others.

    Args:
        models, rows: by name, evaluated on the same images under the same threat.
        key: the keyword under which the models eat images; None: their first argument.
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
                    result = _with(pixel_model, result, other, theirs)
        found[name] = result
    return found


def _with(model: PixelModel, result: Evaluation, other: str, theirs: Evaluation) -> Evaluation:
    """Return result with one more attack: what broke the other model."""
    begin, before = time.monotonic(), model.queries
    attacked = result.survived & theirs.correct & ~theirs.survived
    if result.adversarials is None or theirs.adversarials is None or not attacked.any():
        return result
    x = torch.from_numpy(theirs.adversarials[attacked]).to(device_of(model))
    y = torch.from_numpy(result.labels[attacked]).to(x.device)
    fooled = fools(predict(model, x, batch_size(x, result.images), attacked=True), y)
    broke = np.zeros(result.images, dtype=bool)
    broke[np.flatnonzero(attacked)] = fooled.cpu().numpy()
    attack = AttackResult({"label": f"transfer from {other}", "class": "crossed",
                           "group": "transfer", "everywhere": False},
                          attacked, broke, None, None, model.queries - before, 0,
                          time.monotonic() - begin)
    attacks, survived = (*result.attacks, attack), result.survived & ~broke
    adversarials = result.adversarials.copy()
    adversarials[broke] = theirs.adversarials[broke]
    again = {flag.name: flag for flag in flags_of_attacks(
        attacks, result.correct, survived, result.certified, model.quantized, 0)}
    flags = tuple(again.pop(flag.name, flag) for flag in result.flags)
    curve = tuple(point if point.eps < result.threat.eps else dataclasses.replace(
        point, standing=min(point.standing, int(survived.sum()))) for point in result.curve)
    return dataclasses.replace(result, survived=survived, attacks=attacks, curve=curve,
                               flags=(*flags, *again.values()), adversarials=adversarials)
