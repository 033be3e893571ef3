"""Certify robustness: a lower bound of each image's margin that no attack can break.

Bounds are carried through the model as intervals (Gowal et al. 2018, arXiv:1810.12715), which pass
a staircase exactly and collapse to a point where both ends fall on one step; what they leave
undecided is tried again with linear bounds that go back from the margin to the pixels (CROWN:
Zhang et al. 2018, arXiv:1811.00866) over the intervals' own bounds of what lies between.

Both hold for the float32 function that runs, not only for real numbers: see
:mod:`quantguard.bounds.boxes` for what is covered and what is not.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .attacks import PGD, FoolboxModel, PixelModel
from .attacks._foolbox import fb
from .attacks.losses import fools, project
from .batches import check_labels
from .bounds import (
    Box,
    Flat,
    around,
    check_faithful,
    divided,
    flattened,
    margins,
    propagate,
)
from .certificate import Certificate
from .errors import ConversionError, Interrupted, SpecError
from .evidence import padded, predict
from .files import replacing
from .images import Images, batch_size, check_count, gather, warn_if_sorted
from .keeping import arrays, locked
from .metadata import check_classes, resolved
from .progress import Progress
from .running import (
    check_model,
    check_numbers,
    device_of,
    entry_point,
    environment,
    evaluating,
    measuring,
    ordinary,
    seconds_of,
    usable_device,
    version,
)
from .spec import Threat, plain

# What an image has been through once branch and bound is done with it.
_BRANCHED = 3
# Boxes of one image that are bounded at a time: small models wait for calls, not for arithmetic.
_TOGETHER, _ELEMENTS = 1024, 1 << 18
METHODS = ("auto", "ibp", "crown")


@entry_point
def certify(model: nn.Module, loader: Iterable[Any], threat: Threat | None = None, *,
            method: str = "auto", images: int | None = None,
            splits: int = 0, budget: float | str | None = None,
            run_dir: str | os.PathLike[str] | None = None,
            device: str | torch.device | None = None, progress: bool = True) -> Certificate:
    """Return, for every image, a lower bound of its margin that no attack can break.

    Works on converted and on float models alike, and leaves no trace on them. The model must be
    one graph of: linear layers, convolutions (not transposed ones), BatchNorm, average, max and
    adaptive pooling (in one and two dimensions), sums, concatenation, reshapes, padding with
    zeros, arithmetic with constants, products, means, largest and smallest values, clamps,
    activations that are applied to each number alone (ReLU to GELU, PReLU; not Softmax, GLU or
    those with a jump), staircases; dropout is off.

    Args:
        model: a classifier; what it returns is read as logits.
        loader: re-iterable of (images, labels), or dicts with ``labels``.
        threat: norm, eps and bounds in pixel units; mean and std where the loader normalises;
            None: the model's own, as in :func:`quantguard.evaluate`.
        method: ``ibp`` (intervals), ``crown`` (linear bounds too, for all correct images), or
            ``auto``: linear bounds for what intervals leave undecided.
        images: how many images, the loader's first; None: all.
        splits: into how many parts, at most, the surroundings of an image may be cut that is
            still undecided and that a short attack does not break (branch and bound): a pixel's
            range at its middle, or a staircase's input at a threshold. It decides what is left on
            models of few inputs, and next to nothing on large images.
        budget: seconds, or as in ``"90s"``, ``"5m"``, that it may take: images that there is no
            time for count as not certified.
        run_dir: keeps what is done; the same call again goes on from there.
        device: where to run; None: where the model is.
        progress: whether to show it.

    Raises:
        ConversionError: a layer or operation without a rule (it is named), a forward that cannot
            be traced, that carries anything from call to call or asks a clock, or a model that
            returns no logits.
        DataError: images or labels that do not fit.
        SpecError: an unknown method, a budget that is no time, images or splits that are no
            number, splits in L2 or below 0, a run_dir of other settings.

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


# Images at which the model is compared with its graph at first, and how often: as they are, at the
# corners where all pixels are darker or brighter, and at random ones.
_LOOKED_AT, _REPEATS, _SHIFTS = 16, 5, (0.0, -1.0, 1.0)
# Intervals of small images take so many batches at a time, of so many pixels in all: what they make
# of the weights is then made less often.
_BATCHES, _PIXELS = 4, 1 << 20


class _State:
    """Hold what is known so far; a run directory keeps it.

    Attributes:
        lower: (N,) bounds; minus infinity where nothing is known.
        done: (N,) how many methods each image has been through.
        sites: for each staircase, how many intervals fall on one step, and how many there are.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], n: int) -> None:
        self.path, self.settings = path, settings
        self.lower, self.done = np.full(n, -np.inf), np.zeros(n, dtype=np.int64)
        self.sites: dict[str, list[int]] = {}
        self.seconds, self._begin = 0.0, time.monotonic()
        if path is not None and path.exists():
            state, lower, done = arrays(path, "state", "lower", "done")
            told = json.loads(str(state))
            if told["settings"] != settings:
                raise SpecError(f"{path.parent} holds a certification of other settings",
                                fix="Use another run directory, or delete this one.")
            self.lower, self.done = lower, done
            self.sites, self.seconds = told["sites"], told["seconds"]

    @property
    def spent(self) -> float:
        """Return the seconds that it took, earlier runs included."""
        return self.seconds + time.monotonic() - self._begin

    def count(self, flat: Flat, node: fx.Node, box: Any) -> None:
        """Count the intervals of a staircase that fall on one step."""
        site = flat.staircase(node)
        if site is None or not isinstance(box, Box):
            return
        counts = self.sites.setdefault(site, [0, 0])
        counts[0] += int((box.lower == box.upper).sum())
        counts[1] += box.lower.numel()

    def save(self) -> None:
        if self.path is None:
            return
        told = {"settings": self.settings, "sites": self.sites, "seconds": self.spent}
        with replacing(self.path) as beside:
            np.savez(beside, lower=self.lower, done=self.done, state=json.dumps(told))


def certificate_of(model: nn.Module, data: Images, threat: Threat, method: str = "auto",
                   limit: float | None = None, run_dir: str | os.PathLike[str] | None = None,
                   show: bool = False, splits: int = 0) -> Certificate:
    """Do what :func:`certify` does, for images that are at hand."""
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
    flat = flattened(model, threat, data.key, data.pixels)
    _agrees(flat, pixel_model, data, threat, batch)
    digest = hashlib.blake2b(data.pixels.cpu().numpy().tobytes()
                             + data.labels.cpu().numpy().tobytes(), digest_size=16).hexdigest()
    settings = json.loads(json.dumps({
        "threat": threat.to_dict(), "method": method, "splits": splits, "images": digest,
        "model": flat.digest(), "version": version(),
        "predictions": hashlib.blake2b(logits.cpu().numpy().tobytes(),
                                       digest_size=16).hexdigest()}))
    path = None
    if run_dir is not None:
        path = Path(run_dir) / "certificate.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
    state = _State(path, settings, len(correct))
    bar = Progress("certify", len(correct), show)
    try:
        _bound(flat, pixel_model, data, threat, batch, method, correct, logits, state, limit, bar)
        if splits:
            _branch(flat, pixel_model, data, threat, batch, splits, correct, state, limit, bar)
    except KeyboardInterrupt:
        bar.close()
        kept = "nothing was kept" if path is None else f"saved in {path.parent}"
        rest = f", and branch and bound of {int((state.done == _BRANCHED).sum())}" * bool(splits)
        raise Interrupted(f"interrupted after {int((state.done > 0).sum())} of {len(correct)} "
                          f"images{rest}; {kept}", fix="With run_dir= the next run goes on from "
                          "where it stopped.") from None
    bar.close()
    return Certificate(correct & (state.lower > 0), correct, state.lower,
                       {name: one / max(every, 1) for name, (one, every) in state.sites.items()},
                       state.spent, threat, method, environment(data.pixels.device), digest,
                       int((state.done == 0).sum()), splits, data.sample)


def _agrees(flat: Flat, model: PixelModel, data: Images, threat: Threat, batch: int) -> None:
    """See that the model is what its graph says it is: at images, at corners, and again.

    Raises:
        ConversionError: it is not.
    """
    first = data.pixels[:_LOOKED_AT]
    for number in range(_REPEATS):
        signs = torch.randint(0, 2, first.shape, device=first.device) * 2.0 - 1
        signs = torch.full_like(first, _SHIFTS[number]) if number < len(_SHIFTS) else signs
        points = (first + threat.eps * signs).clamp(*threat.bounds)
        part, size = padded(points, batch)
        check_faithful(flat, points, threat, model(part)[:size])


def _bound(flat: Flat, model: PixelModel, data: Images, threat: Threat, batch: int, method: str,
           correct: np.ndarray, logits: Tensor, state: _State, limit: float | None,
           bar: Progress) -> None:
    """Bound all images by intervals; then, as method says, some by linear bounds."""
    rounds = ["ibp"] if method == "ibp" else ["ibp", "crown"]
    for number, kind in enumerate(rounds):
        wanted = state.done == number
        if kind == "crown":
            wanted &= correct if method == "crown" else correct & ~(state.lower > 0)
            bar.extend(int(wanted.sum()))
        chosen, taped = np.flatnonzero(wanted), kind == "crown"
        together = batch if taped else \
            max(batch, min(_BATCHES * batch, _PIXELS // data.pixels[0].numel()))
        for first in range(0, len(chosen), together):
            if limit is not None and state.spent > limit:
                return
            rows = chosen[first : first + together]
            ball = around(data.pixels[rows], threat, data.snapped, brief=not taped)
            box = propagate(flat, ball, taped,
                            None if taped else functools.partial(state.count, flat))
            gaps = margins(box, data.labels[rows], taped)
            if not taped:
                _check(flat, model, box, gaps, data, logits, threat, batch, rows)
            lower = gaps.amin(1).nan_to_num(-np.inf, np.inf, -np.inf)
            state.lower[rows] = np.maximum(state.lower[rows], lower.cpu().numpy())
            state.done[rows] = number + 1
            state.save()
            bar.advance(len(rows), f"{int((state.lower > 0).sum())} certified")


def _branch(flat: Flat, model: PixelModel, data: Images, threat: Threat, batch: int, splits: int,
            correct: np.ndarray, state: _State, limit: float | None, bar: Progress) -> None:
    """Cut the boxes of what is undecided, and not broken by an attack, into smaller ones."""
    def late() -> bool:
        return limit is not None and state.spent > limit

    def projected(images: Tensor, x: Tensor) -> Tensor:
        return project(images, x, threat.eps, threat.norm, threat.bounds)
    undecided = correct & ~(state.lower > 0)
    chosen = np.flatnonzero(undecided & (state.done >= 1) & (state.done < _BRANCHED))
    bar.extend(len(chosen))
    together = max(batch, min(_TOGETHER, _ELEMENTS // data.pixels[0].numel()))
    attack = PGD("margin", 50, rel_step=0.4, decay=True, twin=(2, 16))
    for first in range(0, len(chosen), batch):
        if late():
            return
        rows = chosen[first : first + batch]
        (x, size), (y, _) = (padded(v[rows], batch) for v in (data.pixels, data.labels))
        with torch.enable_grad():
            found = attack.run(FoolboxModel(model, threat), x, fb.criteria.Misclassification(y),
                               epsilon=threat.eps)
        stands = (~fools(model(projected(found, x)), y))[:size].cpu().numpy()
        for row in rows[stands]:
            image, label = data.pixels[row : row + 1], data.labels[row : row + 1]

            def broken(images: Tensor, image: Tensor = image, label: Tensor = label) -> bool:
                answers = model(projected(images, image.expand_as(images)))
                return bool(fools(answers, label).any())
            ball = around(image, threat, data.snapped)
            lower = divided(flat, ball, label, splits, together, broken, late)
            state.lower[row] = max(state.lower[row], lower)
            if not late():
                state.done[row] = _BRANCHED
            state.save()
            bar.advance(1, f"{int((state.lower > 0).sum())} certified")
        state.done[rows[~stands]] = _BRANCHED
        bar.advance(int((~stands).sum()), f"{int((state.lower > 0).sum())} certified")


def _check(flat: Flat, model: PixelModel, box: Box, gaps: Tensor, data: Images, logits: Tensor,
           threat: Threat, batch: int, rows: np.ndarray) -> None:
    """See that what the model itself answers lies within the bounds.

    At the images, and beside the first of them, a batch. It does by proof, unless the model is not
    what its graph says it is.

    Args:
        box, gaps: bounds of the logits and of the margins (N, C) of these rows.

    Raises:
        ConversionError: it does not.
    """
    pixels, labels = data.pixels[rows[:batch]], data.labels[rows].unsqueeze(1)
    signs = torch.randint(0, 2, pixels.shape, device=pixels.device) * 2.0 - 1
    length = 1.0 if threat.norm == "linf" else pixels[0].numel() ** -0.5
    corner = (pixels + threat.eps * length * signs).clamp(*threat.bounds)
    part, size = padded(corner, batch)
    beside = model(part)[:size]
    check_faithful(flat, corner[:1], threat, beside[:1])
    for answer in (logits[rows].double(), beside.double()):
        n = len(answer)
        outside = (answer < box.lower[:n]) | (answer > box.upper[:n])
        other = torch.ones_like(outside).scatter_(1, labels[:n], False)
        outside |= other & (answer.gather(1, labels[:n]) - answer < gaps[:n])
        if outside.any():
            image = rows[int(outside.any(1).nonzero()[0])]
            raise ConversionError(
                f"the model's own answer for image {image} lies outside its bounds",
                why="Its forward is not what its graph says: it may branch on values, keep state "
                    "between calls, or run in less than float32.",
                fix="No certificate can be had for this model as it is.")
