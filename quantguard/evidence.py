"""What an evaluation finds out about the model and about itself, before and after the attacks."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import masking
from .attacks import PGD, FoolboxModel, PixelModel
from .attacks.losses import (
    fools,
    input_gradient,
    margin,
    named,
    ruled_out,
    says_one,
)
from .attacks.noise import image_noise
from .attacks.suites import BLIND
from .budget import FIDELITY, Budget
from .contexts import backward, soften
from .errors import ConversionError
from .images import Images
from .masking import Flag
from .pooling import pools_first
from .results import AttackResult
from .running import run
from .spec import Threat

# Logits this far apart: of 1 - p, under 1e-5, and of cross-entropy's gradient few digits are left.
_SATURATED = 12.0
# Images that are enough to see that a forward is random, or looks at its whole batch.
_FEW = 64
_DIRECTIONS = 64
# The softened model is smoothest there.
_SMOOTH = 2.0
# What the fidelity of the softened model with its own changes is called.
ITSELF = "softened k 2, of itself"
# With less time fidelity is that of fewer images, but of so many, and in so many directions.
_FEWEST, _FEWEST_DIRECTIONS = 4, 16
# Gradient steps of the attack that may change pixels to anything.
_STEPS = 20
# Images of a batch that tell how fast a model is, where they take at least so many seconds.
_PACED, _TELLING = 8, 0.05


def predict(model: PixelModel, x: Tensor, batch: int, where: str = "",
            attacked: bool = False) -> Tensor:
    """Return the logits of all images.

    Args:
        attacked: whether the images are an attacker's: then rows that name no class are NaN, and
            no error.

    Raises:
        DataError: the model does not accept images of this shape.
        ConversionError: logits that name no class.
    """
    parts = []
    for start in range(0, len(x), batch):
        part, size = padded(x[start : start + batch], batch)
        with torch.no_grad():
            logits = run(model, part, where)[:size]
        if torch.isnan(logits).any() and not attacked:
            first = start + int(logits.isnan().any(1).nonzero()[0])
            raise ConversionError("the model puts out NaN logits, or infinite ones that name no "
                                  "class", why=f"First at image {first}.",
                                  fix="Look at what it computes there: log of 0, 0 / 0, or an "
                                      "overflow in half precision.")
        parts.append(logits)
    return torch.cat(parts)


def padded(x: Tensor, batch: int) -> tuple[Tensor, int]:
    """Fill a last batch up, and return how many images are its own.

    How images are batched must not change what a kernel computes.
    """
    size = len(x)
    return (x if size == batch else torch.cat([x, x[-1:].expand(batch - size, *x.shape[1:])])), size


def are_probabilities(logits: Tensor) -> bool:
    """Return whether a model puts out a softmax where logits are expected."""
    return bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-3).all())


def saturated(logits: Tensor, labels: Tensor) -> bool:
    """Return whether logits are so far apart, on over 1 % of the correct images."""
    gaps = -margin(logits, labels)
    correct = gaps > 0
    return bool((gaps > _SATURATED).sum() > 0.01 * correct.sum())


def pace(model: PixelModel, x: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the seconds that one of a batch's images takes, forward and with a gradient.

    As it is attacked: through the softened twin, where there is one. Where few images take long,
    they tell.
    """
    x, labels = (padded(v, max(len(v), 2))[0] for v in (x, labels))
    seconds = [_seconds(model, x[:_PACED], labels[:_PACED], gradient) for gradient in (False, True)]
    if sum(seconds) * _PACED < _TELLING:
        seconds = [_seconds(model, x, labels, gradient) for gradient in (False, True)]
    return seconds[0], seconds[1]


def _seconds(model: PixelModel, x: Tensor, labels: Tensor, gradient: bool) -> float:
    """Return the seconds that each of these images takes."""
    with soften(model, 8.0), pools_first(model):
        for _ in range(2):  # the first compiles, or looks for the fastest kernel
            begin = time.monotonic()
            if gradient:
                input_gradient(model, x, labels, "margin")[0].sum().item()
            else:
                predict(model, x, len(x), attacked=True).sum().item()
            took = time.monotonic() - begin
    return took / len(x)


def all_flags(model: PixelModel, data: Images, threat: Threat, batch: int, seed: int,
              correct: np.ndarray, survived: np.ndarray, certified: np.ndarray,
              results: Iterable[AttackResult], rounds: int,
              over_eps: Sequence[np.ndarray], budget: Budget,
              faithful: Mapping[str, float]) -> tuple[Flag, ...]:
    """Return every check of the model and of its evaluation.

    Args:
        certified: (N,) images that no attack can break: where the truth is known, no attack is
            doubted.
        rounds: how many rounds of escalation there could have been.
        over_eps: masks (n,) of what one attack broke at ascending eps.
        budget: survivors that there is no time for are not looked at, which is noted in it.
        faithful: see :func:`fidelity`.
    """
    results, pixels, labels = list(results), data.pixels, data.labels
    unsteady, beside = _unsteady(model, pixels, batch)
    flags = [masking.probabilities(model.probabilities),
             *flags_of_attacks(results, correct, survived, certified, model.quantized, rounds),
             masking.gradient_misleads(faithful.get(ITSELF, faithful.get("gradient")),
                                       ITSELF in faithful),
             masking.random_forward(unsteady, min(len(pixels), _FEW)),
             masking.looks_at_its_batch(beside, min(len(pixels), _FEW)),
             masking.one_class_alone(
                 int(says_one(predict(model, pixels[:_FEW], batch, attacked=True)).sum()),
                 min(len(pixels), _FEW))]
    if over_eps:
        flags.append(masking.not_monotone(
            sum(int((less & ~more).sum()) for less, more in itertools.pairwise(over_eps)),
            (len(over_eps) - 1) * int(correct[:len(over_eps[0])].sum())))
    chosen = np.flatnonzero(survived & ~certified)
    for name, check, flag, each in (
            ("zero input gradients", _zero_gradients, masking.zero_gradients,
             2 * budget.gradient),
            ("survives without bounds", _unbounded, masking.unbounded, _STEPS * budget.step)):
        few = chosen[:budget.fitting(name, len(chosen), each)]
        flags.append(flag(sum(check(model, x, y, size, threat, seed) for x, y, size
                              in batches(pixels, labels, few, batch)), len(few)))
    return tuple(flags)


def fidelity(model: PixelModel, data: Images, correct: np.ndarray, threat: Threat, batch: int,
             seed: int, budget: Budget) -> dict[str, float]:
    """Return, for each surrogate gradient, how well it foretells what the margin really does.

    The median over correct images of the correlation, over random sign directions d, between the
    margin's change from ``x - h d`` to ``x + h d``, h = eps / 4, and the surrogate's derivative in
    direction d; 0 where either is constant. Where quantizers are softened to be climbed, that of
    the softened model with its own changes is given, too: what its gradient says of itself. With
    little time it is that of fewer images, and then
    in fewer directions, which is noted in the budget; with less there is none.
    """
    pixels, labels = data.pixels, data.labels
    model.look_for_foreign_steps(pixels)
    rows = fidelity_rows(data, correct)
    # counted in images whose answers are asked for; what a gradient takes is little beside it
    asked = 2 * _DIRECTIONS * len(rows)
    few = budget.fitting("fidelity", asked, budget.forward, share=FIDELITY, noun="answers")
    directions = _DIRECTIONS
    if few < asked:
        rows = rows[:max(few // (2 * _DIRECTIONS), min(_FEWEST, len(rows)))]
        directions = min(_DIRECTIONS, few // (2 * max(len(rows), 1)))
    if not len(rows) or directions < _FEWEST_DIRECTIONS:
        return {}
    x, y, h = pixels[rows], labels[rows], threat.eps / 4
    unit = torch.stack([image_noise(x, "linf", seed, f"fidelity {i}").sign()
                        for i in range(directions)])
    if threat.norm == "l2":
        unit = unit / x[0].numel() ** 0.5
    # some models take no pixel outside its bounds: what was moved is what counts
    up, down = (torch.stack([(x + side * d).clamp(*threat.bounds) for d in unit])
                for side in (h, -h))

    def changes(count: int) -> Tensor:
        """Return the margin's change from down to up, in so many directions, (count, n)."""
        one, other = (margin(torch.cat([
            predict(model, torch.cat(some), batch, attacked=True)
            for some in _lots(iter(side[:count]), max(1, batch // len(x)))]), y.repeat(count))
            for side in (up, down))
        return (one - other).reshape(count, -1).nan_to_num(0.0, 0.0, 0.0)

    def slopes() -> Tensor:
        """Return what the gradient says of it."""
        gradient = torch.cat([input_gradient(model, images, classes, "margin")[0][:size]
                              for images, classes, size in batches(pixels, labels, rows, batch)])
        return ((up - down) * gradient).flatten(2).sum(2)
    found, true = {}, changes(directions)
    surrogates: dict[str, AbstractContextManager[Any]] = {}
    if model.quantized:
        surrogates = {mode: backward(model, mode) for mode in ("ramp", "sigmoid(8)")}
    elif not model.foreign:
        surrogates = {"gradient": nullcontext()}
    for name, surrogate in surrogates.items():
        with surrogate, pools_first(model):
            found[name] = float(_correlation(true, slopes()).median())
    if model.quantized or model.foreign:
        with model.softened(8.0):
            found["twin k 8"] = float(_correlation(true, slopes()).median())
        with model.softened(_SMOOTH):
            few = min(directions, _FEWEST_DIRECTIONS)
            found[ITSELF] = float(_correlation(changes(few), slopes()[:few]).median())
    return found


def fidelity_rows(data: Images, correct: np.ndarray) -> np.ndarray:
    """Return the correct images that fidelity is measured on, where there is time."""
    return np.flatnonzero(correct)[:_FEW if data.pixels[0].numel() <= 3 * 64 * 64 else 8]


def fidelity_cost(data: Images, correct: np.ndarray) -> float:
    """Return roughly how many gradients fidelity takes, for the ETA."""
    return 2 * _DIRECTIONS * len(fidelity_rows(data, correct)) / 3


def _lots(values: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Yield so many of the values at a time."""
    values = iter(values)
    while some := list(itertools.islice(values, size)):
        yield some


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return the correlation over the first dimension; 0 where either is constant."""
    a, b = (v.double() - v.double().mean(0) for v in (a, b))
    scale = a.norm(dim=0) * b.norm(dim=0)
    return torch.where(scale > 0, (a * b).sum(0) / scale.clamp_min(1e-300), 0.0)


def batches(pixels: Tensor, labels: Tensor, chosen: np.ndarray,
            batch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield the chosen images and labels in batches, and how many are of account.

    A lone image is doubled, for a forward that squeezes its axes of size 1.
    """
    for first in range(0, len(chosen), batch):
        rows = chosen[first : first + batch]
        x, size = padded(pixels[rows], max(len(rows), 2))
        yield x, padded(labels[rows], len(x))[0], size


def flags_of_attacks(results: Sequence[AttackResult], correct: np.ndarray, survived: np.ndarray,
                     certified: np.ndarray, quantized: bool, rounds: int) -> tuple[Flag, ...]:
    """Compare what the attacks broke.

    Args:
        certified: (N,) images that no attack can break, or so it was proven.
        rounds: how many rounds of escalation there could have been.
    """
    n, results = len(correct), [r for r in results if r.error is None]
    none = np.zeros(n, dtype=bool)
    by_group: dict[str, np.ndarray] = {}
    for result in results:
        by_group[result.group] = by_group.get(result.group, none) | result.broke
    seeing = none.copy()
    for group, broken in by_group.items():
        if group not in BLIND:
            seeing |= broken
    flags: list[Flag] = []
    if "pgd" in by_group:
        rest = correct & ~by_group["pgd"] & ~by_group.get("fgsm", none)
        flags.append(masking.overstated(int((rest & ~survived).sum()), n, int(survived.sum())))
        whole = any(r.group == "pgd" and bool((r.attacked | ~correct).all()) for r in results)
        if "fgsm" in by_group and whole:
            one, many = by_group["fgsm"], by_group["pgd"]
            flags.append(masking.one_step_beats_many(int((one & ~many).sum()),
                                                     int((many & ~one).sum()), n))
        if quantized and "modes" in by_group:
            others = by_group["modes"] | by_group.get("twin", none)
            flags.append(masking.modes_disagree(int((rest & others).sum()), n))
    losses = {r.settings["loss"]: r.broke for r in results if r.settings.get("everywhere")
              and r.settings.get("loss") in ("ce", "scaled") and r.group in ("pgd", "scaled")}
    if len(losses) == 2:
        plain, scaled = losses["ce"], losses["scaled"]
        flags.append(masking.saturated_logits(int((scaled & ~plain).sum()),
                                              int((plain & ~scaled).sum()), n))
    stand = correct & ~seeing & ~certified
    tried = any(r.group not in BLIND and bool((r.attacked | ~correct).all()) for r in results)
    # where no attack that sees a gradient has met all images, blind ones came before, not better
    flags += [masking.blind_beats_seeing(name, int((by_group[name] & stand).sum()),
                                         int(stand.sum()))
              for name in BLIND if name in by_group and tried]
    flags.append(masking.unseen(quantized, set(by_group)))
    if rounds:
        broken_by = [int(r.broke.sum()) for r in results if r.group == "escalation"]
        flags.append(masking.escalation_pays(broken_by, rounds, n))
    again = [r for r in results if r.group == "reseeded"]
    if again:
        times = np.sum([r.broke for r in again], axis=0)
        flags.append(masking.reseeding_pays(int((times == 1).sum()), len(again),
                                            int(again[0].attacked.sum())))
    if certified.any():
        flags.append(masking.refuted(int((certified & ~survived).sum()), int(certified.sum())))
    return tuple(flags)


def _unsteady(model: PixelModel, pixels: Tensor, batch: int) -> tuple[int, int]:
    """Count images whose answer is random, and those whose answer depends on their batch.

    Through the smooth twin: where a sum is rounded otherwise, a staircase may take another level.
    """
    x = pixels[:_FEW]
    with soften(model, 2.0):
        once, twice, halved = (predict(model, x, size, attacked=True)
                               for size in (batch, batch, max(batch // 2, 1)))
    random = _differs(once, twice, 0.0)
    return int(random.sum()), int((_differs(once, halved, 1e-4) & ~random).sum())


def _differs(one: Tensor, two: Tensor, share: float) -> Tensor:
    no_class = ruled_out(one) & ruled_out(two)
    gap, size = (v.masked_fill(no_class, 0).abs().amax(1) for v in (one - two, one))
    return (named(one) != named(two)) | (gap > share * size)


def _zero_gradients(model: PixelModel, x: Tensor, y: Tensor, size: int, threat: Threat,
                    seed: int) -> int:
    """Count images whose input gradient is exactly zero, there and at a random point."""
    start = x + threat.eps * image_noise(x, threat.norm, seed, "zero gradients")
    flat = torch.ones(size, dtype=torch.bool, device=x.device)
    for point in (x, start.clamp(*threat.bounds)):
        # the margin: a saturated softmax rounds cross-entropy's gradient to zero by itself
        gradient = input_gradient(model, point, y, "margin")[0][:size]
        flat &= (gradient == 0).flatten(1).all(1)
    return int(flat.sum())


def _unbounded(model: PixelModel, x: Tensor, y: Tensor, size: int, threat: Threat,
               seed: int) -> int:
    """Count images that survive even where every pixel may take any value."""
    import foolbox as fb
    low, high = threat.bounds
    eps = (high - low) * (x[0].numel() ** 0.5 if threat.norm == "l2" else 1.0)
    attack = PGD("margin", _STEPS, rel_step=0.25, decay=True, twin=(2, 16), norm=threat.norm,
                 seed=seed)
    found = attack.run(FoolboxModel(model, threat), x, fb.criteria.Misclassification(y),
                       epsilon=eps)
    with torch.no_grad():
        return int((~fools(model(found), y))[:size].sum())
