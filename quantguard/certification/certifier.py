"""Certify robustness: a lower bound of each image's margin that holds against every attack.

Bounds are carried through the model as intervals (Gowal et al. 2018, arXiv:1810.12715). Intervals
pass a quantizer exactly, and collapse to a point where both ends fall on one level. Images that
they leave undecided are bounded again by linear bounds, which go back from the margin to the pixels
(CROWN: Zhang et al. 2018, arXiv:1811.00866) and use the intervals as bounds of intermediate values.

Both hold for the float32 function that runs, not only for real numbers: see
:mod:`quantguard.certification.rules.intervals` for what is covered and what is not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attacks import PixelModel
from ..attacks.losses import fools
from ..attacks.predictions import predict
from ..core.errors import Interrupted, SpecError
from ..core.metadata import check_classes, resolved
from ..core.module_utils import check_model, check_numbers, evaluating, ordinary
from ..core.nested_tensors import device_of
from ..core.progress import Progress
from ..core.run_dir import locked
from ..core.runtime import entry_point, environment, measuring, seconds_of, usable_device, version
from ..core.specs import Threat, plain
from ..data.batches import check_labels
from ..data.images import Images, batch_size, check_count, gather, warn_if_sorted
from .certificate import Certificate
from .certifier_state import CertifierState
from .graph.graph import model_graph
from .image_bounds import ImageBounds

METHODS = ("auto", "ibp", "crown")


@entry_point
def certify(model: nn.Module, loader: Iterable[Any], threat: Threat | None = None, *,
            method: str = "auto", images: int | None = None,
            splits: int = 0, budget: float | str | None = None,
            run_dir: str | os.PathLike[str] | None = None,
            device: str | torch.device | None = None, progress: bool = True) -> Certificate:
    """Return, for every image, a lower bound of its margin that holds against every attack.

    Works on converted and on float models, and does not change them. The model must be one graph
    of: linear layers, convolutions (not transposed ones), BatchNorm, average, max and adaptive
    pooling (in one and two dimensions), sums, concatenation, reshapes, padding with zeros,
    arithmetic with constants, products, means, largest and smallest values, clamps, elementwise
    activations (ReLU to GELU, PReLU; not Softmax, GLU or those with a jump) and quantizers.
    Dropout is off.

    Args:
        model: a classifier that returns logits.
        loader: re-iterable of (images, labels), or dicts with ``labels``.
        threat: norm, eps and bounds in pixel units; mean and std where the loader normalises;
            None: the model's own, as in :func:`quantguard.evaluate`.
        method: ``ibp`` (intervals), ``crown`` (also linear bounds, for all correct images), or
            ``auto``: linear bounds for the images that intervals leave undecided.
        images: how many images, the loader's first; None: all.
        splits: the most boxes that branch and bound may bound for one image. It takes images that
            are still undecided and that a short attack does not break, and splits a pixel's range
            at its middle or a quantizer's input at a threshold. It decides the remaining images of
            models with few inputs, and next to none of large images.
        budget: time limit in seconds, or as in ``"90s"``, ``"5m"``. Images for which there is no
            time count as not certified.
        run_dir: folder for intermediate results; the same call resumes from them.
        device: where to run; None: where the model is.
        progress: whether to show a progress bar.

    Raises:
        ConversionError: a layer or operation without a rule (the message names it), a forward that
            cannot be traced, keeps state between calls or reads a clock, or a model that returns
            no logits.
        DataError: images or labels that do not fit.
        SpecError: an unknown method, a budget that is not a time, images or splits that are not
            whole numbers, splits below 0 or in L2, or a run_dir of other settings.

    Example:
        >>> certificate = certify(model, loader, Threat(eps=8 / 255))  # doctest: +SKIP
        >>> certificate.certified_accuracy  # doctest: +SKIP
    """
    if method not in METHODS:
        raise SpecError(f"method={method!r} is unknown", fix=f"Use one of {', '.join(METHODS)}.")
    check_model(model)
    threat = resolved(model, threat, progress)
    images, splits = plain(images), plain(splits)
    if not isinstance(splits, Integral) or splits < 0 or (splits and threat.norm != "linf"):
        raise SpecError(f"splits={splits!r} in {threat.norm}",
                        fix="Give a whole number, 0 or more, and more than 0 in linf only.")
    check_count(images)
    limit = None if budget is None else seconds_of(budget)
    check_numbers(model)
    model = ordinary(model)
    before = device_of(model)
    if device is not None:
        model.to(usable_device(device))
    try:
        with locked(run_dir), evaluating(model):
            data = gather(model, loader, threat, images)
            return certificate_of(model, data, threat, method, limit, run_dir, progress, splits)
    finally:
        if device is not None:
            model.to(before)


def certificate_of(model: nn.Module, data: Images, threat: Threat, method: str = "auto",
                   limit: float | None = None, run_dir: str | os.PathLike[str] | None = None,
                   show: bool = False, splits: int = 0) -> Certificate:
    """Return what :func:`certify` returns, for images that are in memory."""
    with torch.inference_mode(False), measuring(model, 0), torch.no_grad():
        return _certify(model, data, threat, method, limit, run_dir, show, splits)


def _certify(model: nn.Module, data: Images, threat: Threat, method: str, limit: float | None,
             run_dir: str | os.PathLike[str] | None, show: bool, splits: int) -> Certificate:
    pixel_model = PixelModel(model, threat, data.key)
    batch = batch_size(data.pixels)
    logits = predict(pixel_model, data.pixels, batch)
    check_labels(data.labels, logits.shape[1], "the loader")
    check_classes(model, data.classes, logits.shape[1])
    warn_if_sorted(data, logits.shape[1])
    correct = (~fools(logits, data.labels)).cpu().numpy()
    bounds = ImageBounds(model_graph(model, threat, data.key, data.pixels), pixel_model, data,
                         threat, batch, logits, correct)
    bounds.check_model()
    digest = hashlib.blake2b(data.pixels.cpu().numpy().tobytes()
                             + data.labels.cpu().numpy().tobytes(), digest_size=16).hexdigest()
    settings = json.loads(json.dumps({
        "threat": threat.to_dict(), "method": method, "splits": splits, "images": digest,
        "model": bounds.graph.digest(), "version": version(),
        "predictions": hashlib.blake2b(logits.cpu().numpy().tobytes(),
                                       digest_size=16).hexdigest()}))
    path = None
    if run_dir is not None:
        path = Path(run_dir) / "certificate.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
    state = CertifierState(path, settings, len(correct), limit)
    bar = Progress("certify", len(correct), show)
    try:
        bounds.bound(method, state, bar)
        if splits:
            bounds.branch(splits, state, bar)
    except KeyboardInterrupt:
        bar.close()
        saved = "nothing was saved" if path is None else f"saved in {path.parent}"
        branched = f", and branch and bound of {state.branched}" if splits else ""
        raise Interrupted(f"interrupted after {int((state.done > 0).sum())} of {len(correct)} "
                          f"images{branched}; {saved}",
                          fix="With run_dir= the next run resumes this one.") from None
    bar.close()
    return Certificate(correct & (state.lower > 0), correct, state.lower,
                       {name: one / max(every, 1) for name, (one, every) in state.sites.items()},
                       state.spent, threat, method, environment(data.pixels.device), digest,
                       int((state.done == 0).sum()), splits, data.sample)
