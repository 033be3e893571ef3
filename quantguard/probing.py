"""Look at a model in training: its batches as pixels, its probe, the scale of its gradients.

And the statistics of its BatchNorms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .activation import staircases
from .attacks import PGD, FoolboxModel, PixelModel
from .attacks.losses import fools
from .batches import check_images, check_labels, to_pixels, unpack
from .batching import Source
from .contexts import bypass, listening
from .errors import DataError, SpecError
from .evidence import predict
from .held import SOME
from .images import image_tensor
from .running import (
    as_eaten,
    device_of,
    evaluating,
    frozen,
    modes_kept,
    run,
    seeded,
    tensors_in,
)
from .spec import Threat
from .world import World

# Batches that BatchNorm statistics are estimated from.
_STATISTICS = 32
# One sign step of this size may change the loss by so much to first order: what a LeNet's
# hand-tuned 2.5e-3 amounts to. Large pretrained nets get less, and none gets more than what
# hardened 2 bits best.
_TRUST = 3.0
LR_RANGE = (1e-5, 5e-3)


def copied(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every tensor of a model's state.

    Raises:
        SpecError: there is something else in it.
    """
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            if "_packed_params" in name:
                raise SpecError(f"{name} in the model's state is packed: torch.ao has quantized "
                                "its weights, which cannot be trained any more",
                                fix="Harden the float model, and quantize its weights afterwards.")
            raise SpecError(f"{name} in the model's state is a {type(value).__name__}, no tensor",
                            fix="Make it a buffer: register_buffer(name, torch.tensor(...)).")
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


class PixelBatches:
    """Turn what a loader yields into pixels and labels for one model, checked.

    Args:
        model: whose images they are.
        threat: maps them to pixels.
        unlabelled: whether images may come without labels, or with the label -1.
    """

    def __init__(self, model: PixelModel, threat: Threat, unlabelled: bool = False) -> None:
        self.model, self.threat, self.unlabelled = model, threat, unlabelled
        self.device = device_of(model)
        self.classes: int | None = None
        self.shapes: set[torch.Size] = set()  # of images that the model is known to accept

    def __call__(self, batch: Any, number: int,
                 name: str = "the loader") -> tuple[Tensor, Tensor]:
        where = f"batch {number} of {name}"
        inputs, labels = unpack(batch)
        self.model.key, x = image_tensor(inputs, where)
        if labels is None and self.unlabelled:
            labels = torch.full((len(x),), -1)
        if labels is None:
            raise DataError(f"{where} has no labels", fix="Yield (images, labels).")
        self._check(labels, where)
        if len(x) != len(labels):
            raise DataError(f"{where} has {len(x)} images and {len(labels)} labels")
        pixels = to_pixels(x.to(self.device, self.model.dtype), self.threat)
        check_images(pixels, self.threat.bounds, where)
        # undoing a normalisation rounds
        pixels = pixels.clamp(*self.threat.bounds)
        if pixels.shape[1:] not in self.shapes:
            with evaluating(self.model):
                self.classes = predict(self.model, pixels[:2], 2, where).shape[1]
            self.shapes.add(pixels.shape[1:])
            self._check(labels, where)
        return pixels, labels.to(self.device).long()

    def _check(self, labels: Tensor, where: str) -> None:
        check_labels(labels[labels != -1] if self.unlabelled else labels, self.classes, where)


class Probed(NamedTuple):
    """Hold clean and attacked accuracy on the held-out slice; None where there is no slice."""

    clean: float | None
    attacked: float | None
    images: int


def probe(model: PixelModel, val: Iterable[Any] | None, batches: PixelBatches, threat: Threat,
          attacked: bool, seed: int) -> Probed:
    """Look at the held-out slice: all of it, or where it is attacked some 512 images.

    Attacked under ``sigmoid(8)`` and through the twin: the surrogate that trains would flatter a
    model that masks it.
    """
    if val is None:
        return Probed(None, None, 0)
    attacks = [PGD("margin", 10, mode="sigmoid(8)", norm=threat.norm, seed=seed)]
    if staircases(model):
        attacks.append(PGD("margin", 10, twin=(2, 16), norm=threat.norm, seed=seed))
    clean = robust = total = 0
    with evaluating(model), frozen(model):
        fmodel = FoolboxModel(model, threat)
        for number, batch in enumerate(val):
            x, y = batches(batch, number, "val")
            x, y = x[y >= 0], y[y >= 0]
            if not len(x):
                continue  # no label among them
            with torch.no_grad():
                standing = (~fools(model(x), y)).nonzero().flatten()
            total += len(x)
            clean += len(standing)
            for attack in attacks if attacked else ():
                if len(standing):
                    moved = attack.run(fmodel, x[standing], y[standing], epsilon=threat.eps)
                    with torch.no_grad():
                        standing = standing[~fools(model(moved), y[standing])]
            robust += len(standing)
            if attacked and total >= SOME:
                break
    if not total:
        raise DataError("val is empty", fix="Give at least one batch, or leave val= out.")
    return Probed(clean / total, robust / total, total)


def accuracy_under(attack: Callable[[Tensor, Tensor], Tensor], model: PixelModel,
                   val: Iterable[Any], batches: PixelBatches) -> float:
    """Return the accuracy on some 512 held-out images that an attack has moved."""
    right = total = 0
    with evaluating(model):
        for number, batch in enumerate(val):
            x, y = batches(batch, number, "val")
            x, y = x[y >= 0], y[y >= 0]
            if not len(x):
                continue
            with torch.no_grad():
                moved = attack(x, y)
                right += int((~fools(model(moved), y)).sum())
            total += len(x)
            if total >= SOME:
                break
    return right / max(total, 1)


def parent_accuracy(model: PixelModel, val: Iterable[Any] | None,
                    batches: PixelBatches) -> float | None:
    """Return the float parent's clean accuracy on the held-out slice."""
    with bypass(model):
        return probe(model, val, batches, model.threat, False, 0).clean


def levels_used(model: PixelModel, val: Iterable[Any], batches: PixelBatches) -> dict[str, int]:
    """Return how many of its levels each staircase takes on the held-out slice."""
    modules = staircases(model.model)
    seen = {name: torch.zeros(m.spec.thresholds + 1, dtype=torch.bool)
            for name, m in modules.items()}

    def listener(name: str) -> Callable[[Tensor], None]:
        def listen(z: Tensor) -> None:
            levels = modules[name].levels(z)[~z.isnan()]
            seen[name] |= torch.bincount(levels.flatten(), minlength=len(seen[name])).bool().cpu()
        return listen

    total = 0
    with evaluating(model), torch.no_grad(), \
            listening(model.model, {name: listener(name) for name in modules}):
        for number, batch in enumerate(val):
            x, _ = batches(batch, number, "val")
            model(x)
            total += len(x)
            if total >= SOME:
                break
    return {name: int(levels.sum()) for name, levels in seen.items()}


_Item = TypeVar("_Item")


def of_several(items: Iterable[_Item], size: Callable[[_Item], int]) -> Iterator[_Item]:
    """Yield batches of several images; those of one, the first 32, only where there is no other.

    One image leaves a BatchNorm in training nothing to normalise by.
    """
    single: list[_Item] = []
    several = False
    for item in items:
        if size(item) > 1:
            several = True
            yield item
        elif not several:
            single.append(item)
            if len(single) == _STATISTICS:
                break
    if not several:
        yield from single


def auto_lr(model: nn.Module, source: Source, batches: PixelBatches,
            loss: Callable[[Tensor, Tensor], Tensor], world: World) -> float:
    """Return a peak learning rate from the model's own scale; model is left as it was.

    A step of AdamW moves every weight by about lr, so to first order the loss by lr times the
    gradient's L1 norm: that product is held at a constant.
    """
    norm, count, before = 0.0, 0, copied(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    read = (batches(batch, number) for number, batch in enumerate(source.epoch(0, 0)))
    for pixels, labels in of_several(read, lambda read: len(read[0])):
        grads = torch.autograd.grad(loss(pixels, labels), weights, allow_unused=True)
        norm += sum(float(world.total(g).abs().sum()) for g in grads if g is not None)
        count += 1
        if count == 4:
            break
    model.load_state_dict(before)
    if not math.isfinite(norm):
        raise DataError("the loss or its gradient is NaN or infinite on the first batches",
                        fix="Check the model on clean images first.")
    low, high = LR_RANGE
    return min(max(_TRUST * count / max(norm, 1e-12), low), high)


def _images_in(inputs: Any) -> int:
    return len(next(iter(tensors_in(inputs))))


def is_frozen(norm: nn.Module) -> bool:
    """Return whether a BatchNorm has weights, none of which may change: nor do its statistics."""
    weights = list(norm.parameters())
    return bool(weights) and not any(p.requires_grad for p in weights)


def reestimate(model: nn.Module, loader: Iterable[Any]) -> None:
    """Estimate BatchNorm statistics anew, from a loader's first images.

    Those that came with the weights are of other activations. What is frozen keeps its own.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats
             and not is_frozen(m)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad(), modes_kept(model), seeded(0):
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True  # None: the mean over batches
        try:
            whole = 0
            read = (as_eaten(unpack(batch)[0], model)
                    for batch in itertools.islice(loader, _STATISTICS))
            for inputs in of_several(read, _images_in):
                images = _images_in(inputs)
                whole = max(whole, images)
                if 2 * images > whole:  # the rest of a loader would count as much as a whole batch
                    run(model, inputs)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
