"""Stages of hardening: each converts a model to some bits and fine-tunes it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attacks import PixelModel, logits_of
from ..core.distributed import distributed
from ..core.file_io import write_text
from ..core.metadata import check_shape, class_names_of
from ..core.model_calls import run
from ..core.module_utils import duplicate, evaluating
from ..core.nested_tensors import device_of
from ..core.progress import say
from ..core.runtime import seeded, usable_device
from ..core.specs import FLOAT_BITS, Threat
from ..data.images import check_images_shape, image_tensor
from ..data.train_batches import Source, hold_out
from ..nn.input_quantizer import is_input
from ..nn.quant_activation import quantizers
from .certified import check_certified
from .history import History
from .pixel_batches import PixelBatches
from .prepare import first_inputs, prepare
from .recipes import Recipe
from .trainer import fit
from .validation import parent_accuracy

# A warning is logged below this share of the clean accuracy that the model came with.
_BEHIND = 0.85


@dataclass(frozen=True)
class Stage:
    """Result of one stage: its name, its bits and epochs, and its history.

    ``holds``: whether its clean accuracy is high enough, where a search asks for that.
    """

    name: str
    bits: int
    epochs: int
    history: History
    holds: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"name": self.name, "bits": self.bits, "epochs": self.epochs, "holds": self.holds,
                **{f"history_{k}" if k == "epochs" else k: v
                   for k, v in self.history.to_dict().items()}}


@dataclass(frozen=True)
class Hardened:
    """Result of hardening: the model, and the stages that were trained."""

    model: nn.Module = field(repr=False)
    stages: tuple[Stage, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model, as plain JSON types."""
        return {"stages": [stage.to_dict() for stage in self.stages]}


class StageTrainer:
    """Trains the stages of one ``harden`` call, with common data and settings.

    Attributes:
        model: the model that ``harden`` got.
        stages: the stages that are done.
        others: as the arguments of :func:`quantguard.harden`.
    """

    def __init__(self, model: nn.Module, loader: Iterable[Any], threat: Threat,
                 dynamic: bool | None, recipe: Recipe, train: str, val: Iterable[Any] | None,
                 run_dir: Path | None, seed: int, device: str | torch.device | None,
                 progress: bool) -> None:
        self.model, self.loader, self.threat, self.dynamic = model, loader, threat, dynamic
        self.recipe, self.train, self.val, self.run_dir = recipe, train, val, run_dir
        self.seed, self.device, self.progress = seed, device, progress
        self.stages: list[Stage] = []

    def source(self) -> Source:
        """Return the training batches and the held-out slice, the same for every stage."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fit warns about the loader
            return hold_out(self.loader, self.val, self.recipe.batch_size, self.seed)

    def described(self, model: nn.Module) -> dict[str, Any]:
        """Return shape and class names of the training images, and the number of outputs."""
        inputs = first_inputs(self.source().whole(), model)
        name, x = image_tensor(inputs, "the loader")
        check_images_shape(x, "the loader")
        check_shape(model, x.shape[1:], "the loader")
        with torch.no_grad(), evaluating(model), seeded(self.seed):
            answers = run(model, x[:2] if name is None else {name: x[:2]}, "the loader")
        return {"input_shape": tuple(x.shape[1:]), "outputs": logits_of(answers).shape[1],
                "class_names": class_names_of(self.loader)}

    def train_stage(self, model: nn.Module, bits: int | Mapping[str, int] | None, epochs: int,
                    name: str | None, extends: bool = False) -> tuple[nn.Module, History]:
        """Convert a model to bits, unless it came converted, and fine-tune it.

        Args:
            name: name of the stage; None: there is only one.
            extends: whether a run directory of fewer epochs may be resumed. Only the last stage
                may be: later stages start from the weights of the others.
        """
        before = device_of(model)
        dynamic = None if bits == FLOAT_BITS else self.dynamic
        if self.recipe.certifies:
            check_certified(self.threat, self.train)
        reinitialised = self.recipe.init == "interval"
        if reinitialised:
            self.say("weights are reinitialised for interval training; init=keep (--set init=keep) "
                     "starts from the model's own")
        device = self.device or distributed().device
        moved = model
        # calibration is faster on the device of training, too
        if device is not None and before != usable_device(device):
            moved = duplicate(model).to(device)
        # in a seeded order where possible: a sorted data set starts with a single class
        images = self.source().whole()
        result = prepare(moved, images, bits, dynamic, self.recipe, self.threat, self.seed,
                         convert_again=model is not self.model)
        if not self.stages and any(map(is_input, quantizers(result))) \
                and not any(map(is_input, quantizers(model))):
            self.say(f"a quantizer of {self.recipe.input_bits} bits is placed on the input, over "
                     "the pixel range without eps at both ends; input_bits=0 (--set input_bits=0) "
                     "leaves it out")
        # the statistics that came with the weights are of other activations, or another input
        placed = quantizers(result).keys() != quantizers(model).keys()
        renew = model is not self.model or (placed and self.train == "all" and not reinitialised)
        directory = self.run_dir if self.run_dir is None or name is None else self.run_dir / name
        if name is not None:
            self.say(f"stage {name}, {epochs} epoch{'s' if epochs > 1 else ''}")
        history = fit(result, self.loader, self.threat, self.recipe, epochs=epochs,
                      train=self.train, val=self.val, run_dir=directory, seed=self.seed,
                      progress=self.progress, renew=renew, extends=extends)
        if reinitialised and history.kept.clean is not None:
            self._compare(model, history.kept.clean)
        return result.to(before), history

    def _compare(self, model: nn.Module, clean: float) -> None:
        """Warn if a reinitialised model is much less accurate than the model that came."""
        pixel_model = PixelModel(model, self.threat)
        batches = PixelBatches(pixel_model, self.threat)
        with seeded(self.seed):
            original = parent_accuracy(pixel_model, self.source().val, batches)
        if original is not None and clean < _BEHIND * original:
            self.say(f"warning: held-out clean accuracy is {clean:.1%}, and the model came with "
                     f"{original:.1%}: train longer, or for a smaller eps")

    def say(self, text: str) -> None:
        """Show a line, in the main process."""
        if self.progress and distributed().is_main:
            say(text)

    def save_stages(self) -> None:
        """Write ``stages.json`` to the run directory if there are several stages."""
        if self.run_dir is not None and len(self.stages) > 1 and distributed().is_main:
            write_text(self.run_dir / "stages.json", json.dumps(
                [stage.to_dict() for stage in self.stages], indent=1))


def bits_name(bits: int) -> str:
    """Return the name of a stage of so many bits."""
    return "float" if bits == FLOAT_BITS else f"{bits} bits"
