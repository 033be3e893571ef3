"""Hardening: converts a model, and fine-tunes it in one or several stages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..conversion.converter import inspect, restore
from ..core.errors import SpecError
from ..core.metadata import ModelMetadata, annotate, check_classes, known_of, resolved
from ..core.module_utils import check_model, check_numbers, of_other_tensors, ordinary, unwrap
from ..core.runtime import entry_point, usable_device
from ..core.specs import Threat, check_seed, plain
from ..nn.input_quantizer import is_input
from ..nn.quant_activation import quantizers
from .bit_schedule import train_stages
from .bit_search import lowest_bits
from .recipes import Recipe, recipe_of
from .stage_trainer import Hardened, StageTrainer
from .trainer import check_effort


@entry_point
def harden(model: nn.Module, loader: Iterable[Any], threat: Threat | None = None, *,
           bits: int | Mapping[str, int] | None = None, dynamic: bool | None = None,
           recipe: str | Recipe = "pgd", epochs: int = 3, train: str = "all",
           val: Iterable[Any] | None = None, max_clean_drop: float | None = None,
           run_dir: str | os.PathLike[str] | None = None, seed: int = 0,
           device: str | torch.device | None = None, progress: bool = True) -> nn.Module:
    """Return a copy of the model, quantized if it was not, and adversarially fine-tuned.

    Args:
        model: a float or a converted classifier; it does not change.
        loader: re-iterable of (images, labels). A seeded 5 % of a map-style DataLoader is held out
            to choose the best epoch. Random transforms of its data set apply to the held-out
            images as well: pass ``val`` to avoid that.
        threat: the attacker to train against, in pixel units; its mean and std are those by which
            the loader normalises. None: the model's own, else ``Threat()``.
        bits: 1 to 8, or 32 for a float control. For a float model also {pattern: bits}, with
            patterns as in :func:`convert`. None: those of the converted model, else 2.
        dynamic: whether to learn the thresholds; None: as converted already, else False.
            benchmarks/learned.py shows no gain from learning them.
        recipe: ``pgd``, ``trades``, ``nfgsm``, ``clean``, ``ibp``, or a :class:`quantguard.Recipe`.
            In Linf ``pgd``, ``trades`` and ``ibp`` put an 8-bit quantizer on the input, unless
            ``input_bits=0``. ``ibp`` trains for a certificate: it reinitialises the weights, unless
            ``init="keep"``, and returns the epoch that certifies most held-out images.
        epochs: passes over the loader, in all stages together.
        train: ``all``, or ``thresholds`` for thresholds and steps only.
        val: batches for validation instead of a held-out slice; never the test set.
        max_clean_drop: search for the lowest bits. The model is fine-tuned in float for ``epochs``.
            From there, a float control and models of 8, 4, 3 bits and ``bits`` are trained for as
            many epochs each, while the held-out clean accuracy is at most this much (0 to 1) below
            the float control's. The model with the lowest accepted bits is returned.
        run_dir: folder for metrics and state; the same call again resumes there. A call with more
            epochs than a finished run resumes from the weights that the run returned: the new
            epochs get another learning-rate schedule with the same peak. With several stages only
            the last one may get more epochs.
        seed: of the order of images, random starts and the held-out slice.
        device: where to train; None: the model's device.
        progress: whether to show progress.

    Returns:
        The hardened copy, in the mode of the original and on its device. Its attribute
        ``quantguard`` has the threat, the classes and the input shape; :func:`quantguard.save`
        writes them, and all functions of quantguard use them.

    Raises:
        SpecError: settings that contradict each other or the model.
        DataError: a batch that the model cannot use; the message has its number.
        ConversionError: a model that cannot be converted.

    Example:
        >>> hardened = harden(model, loader, Threat(eps=0.1))  # doctest: +SKIP
    """
    return hardened(model, loader, threat, bits=bits, dynamic=dynamic, recipe=recipe,
                    epochs=epochs, train=train, val=val, max_clean_drop=max_clean_drop,
                    run_dir=run_dir, seed=seed, device=device, progress=progress).model


def hardened(model: nn.Module, loader: Iterable[Any], threat: Threat | None, *,
             bits: int | Mapping[str, int] | None, dynamic: bool | None, recipe: str | Recipe,
             epochs: int, train: str, val: Iterable[Any] | None,
             run_dir: str | os.PathLike[str] | None, seed: int,
             device: str | torch.device | None, progress: bool,
             max_clean_drop: float | None = None) -> Hardened:
    """Do the same as :func:`harden`, and return the results of all stages, too."""
    model, chosen = unwrap(model), recipe_of(recipe)
    check_model(model)
    threat = resolved(model, threat, progress)
    check_seed(seed)
    if threat.eps == 0 and (chosen.attacks or chosen.certifies):
        raise SpecError(f"eps=0 leaves recipe {chosen.name} nothing to train against",
                        fix="Use recipe clean, or an eps above 0.")
    bits = {k: plain(v) for k, v in bits.items()} if isinstance(bits, Mapping) else plain(bits)
    epochs, seed, max_clean_drop = plain(epochs), plain(seed), plain(max_clean_drop)
    if isinstance(bits, Mapping):
        bits = _checked_bits(model, bits)
    if device is not None:
        usable_device(device)  # before any work
    check_effort(epochs, train)
    check_numbers(model)
    other = of_other_tensors(model)
    if other is not None:
        raise SpecError(f"{other[0]} of the model is of class {other[1]}, which cannot be trained",
                        why="Its weights have been quantized, by torchao, say.",
                        fix="Harden the float model, and quantize its weights afterwards.")
    model = ordinary(model)
    trainer = StageTrainer(model, loader, threat, dynamic, chosen, train, val,
                           None if run_dir is None else Path(run_dir), seed, device, progress)
    if max_clean_drop is not None and isinstance(bits, Mapping):
        raise SpecError("max_clean_drop lowers the bits, which are the same at every site",
                        fix="Use bits=1 to 8.")
    if known_of(model) != vars(ModelMetadata()):
        known = trainer.described(model)
        check_classes(model, known["class_names"], known["outputs"])
    if isinstance(bits, Mapping) or max_clean_drop is None:
        made = train_stages(trainer, bits, epochs)
    else:
        made = lowest_bits(trainer, 2 if bits is None else bits, epochs, max_clean_drop)
    known = trainer.described(made.model)
    outputs, names = known.pop("outputs"), known["class_names"]
    annotate(made.model, threat=threat, num_classes=len(names) if names else outputs, **known)
    return made


def _checked_bits(model: nn.Module, bits: Mapping[str, int]) -> int | Mapping[str, int]:
    """Check bits by site before any work; return a number if all sites have the same bits.

    Raises:
        SpecError: a converted model, a pattern that matches nothing, impossible bits.
    """
    if not all(isinstance(b, int) for b in bits.values()):
        raise SpecError(f"bits={dict(bits)!r} must give each pattern 1 to 8, or 32")
    if set(bits) == {"*"}:
        return bits["*"]
    if any(not is_input(name) for name in quantizers(model)):
        raise SpecError("bits by site are for a float model, and this one is converted",
                        fix="Leave bits out, or quantguard.restore(model) first.")
    inspect(restore(model) if quantizers(model) else model, bits)
    return bits
