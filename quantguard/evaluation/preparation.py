"""Before the first attack: images, predictions, settings, and the checks of a replay."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..attacks import PixelModel, Suite
from ..attacks.losses import fools
from ..attacks.predictions import predict
from ..core.errors import DataError, SpecError
from ..core.metadata import check_classes
from ..core.specs import Threat
from ..data.batches import check_labels
from ..data.images import Images, batch_size, gather
from .eps_curve import LABEL
from .model_checks import are_probabilities
from .results import Evaluation
from .suite_runner import OTHERS
from .task import EvaluationTask


def prepare(model: nn.Module, loader: Iterable[Any], threat: Threat, images: int | None,
            seed: int) -> tuple[EvaluationTask, Tensor]:
    """Return the task of an evaluation, and the model's logits on its images.

    Raises:
        DataError: images or labels that do not fit the model.
    """
    data = gather(model, loader, threat, images)
    pixel_model = PixelModel(model, threat, data.key)
    batch = batch_size(data.pixels)
    logits = predict(pixel_model, data.pixels, batch)
    if are_probabilities(logits):
        pixel_model.probabilities = True
        logits = predict(pixel_model, data.pixels, batch)
    check_labels(data.labels, logits.shape[1], "the loader")
    check_classes(model, data.classes, logits.shape[1])
    correct = (~fools(logits, data.labels)).cpu().numpy()
    return EvaluationTask(pixel_model, data, threat, batch, correct, seed), logits


def hash_of(*arrays: np.ndarray) -> str:
    """Return a hash of the bytes of some arrays."""
    return hashlib.blake2b(b"".join(array.tobytes() for array in arrays),
                           digest_size=16).hexdigest()


def image_hash(images: Images) -> str:
    """Return a hash of pixels and labels, in order."""
    return hash_of(images.pixels.cpu().numpy(), images.labels.cpu().numpy())


def settings_of(task: EvaluationTask, suite: Suite, image_hash: str, logits: Tensor,
                certified: np.ndarray | None) -> dict[str, Any]:
    """Return the settings by which a run directory recognises an evaluation, as plain JSON types.

    Args:
        task: model, images and threat.
        suite: the attacks.
        image_hash: of the images.
        logits: of the model.
        certified: (N,) certified images; None: no certificate was asked for.
    """
    settings = {"threat": task.threat.to_dict(), "seed": task.seed,
                "suite": [entry.settings() for entry in suite.every], "images": image_hash,
                "predictions": hash_of(logits.cpu().numpy())}
    if certified is not None:
        settings["certified"] = hash_of(certified)
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def check_replayed_images(replay: Evaluation, image_hash: str) -> None:
    """Check that the images are those of the replayed evaluation.

    Raises:
        DataError: they are not.
    """
    if image_hash != replay.image_hash:
        raise DataError("these are not the images of the evaluation to be replayed",
                        fix="Give the same loader, in the same order.")


def check_replayed_attacks(replay: Evaluation, suite: Suite) -> None:
    """Check that the suite has every attack of the replayed evaluation.

    Raises:
        SpecError: it does not.
    """
    labels = {entry.label for entry in suite.every}
    labels |= {LABEL, *(f"{label}{OTHERS}" for label in labels)}
    gone = [attack.label for attack in replay.attacks if attack.label not in labels]
    if gone:
        more = f" and {len(gone) - 1} more attacks" if len(gone) > 1 else ""
        raise SpecError(f"the evaluation to be replayed ran {gone[0]}{more}, which its suite does "
                        "not have here",
                        why="It is from another version, from a comparison, or of other attacks.",
                        fix="Evaluate again without replay= (--replay).")
