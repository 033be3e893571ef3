"""One training step up to its gradient: the inner attack and the loss of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..attacks import PixelModel
from ..attacks.losses import input_gradient
from ..core.distributed import Distributed
from ..core.errors import ConversionError, DataError, SpecError
from ..core.model_calls import first_line, out_of_memory
from ..core.module_utils import duplicate, evaluating, frozen, modes_restored
from ..core.runtime import seeded
from ..core.specs import Threat
from ..nn.contexts import bypass, soften
from .batchnorm import is_frozen
from .certified import CertifiedObjective
from .inner_attack import answers_of, attacked_images, random_start
from .objectives import Objective, perturbed
from .recipes import Recipe

# Number of images that show whether a gradient reaches them, and the weights.
_FEW = 8
# Torch's message for a BatchNorm in train mode with a single image.
_ONE_VALUE = "Expected more than 1 value per channel"


class TrainStep:
    """Computes the gradient of a batch's loss, in the ``grad`` of a model's parameters.

    Args:
        model: the model that is trained.
        threat, recipe: the attacker, and the terms of the loss.
        whole: whether the whole model is trained, BatchNorm statistics too.
        device: the device of the batches.
        distributed: the processes that share a batch.
        log: called with a message about each problem.

    Attributes:
        objective: the loss of attacked images. It has the recipe, which recovery may replace, and
            whether the network runs in bfloat16.
        parts: number of parts that a batch is split into to fit into memory.
    """

    def __init__(self, model: PixelModel, threat: Threat, recipe: Recipe, whole: bool,
                 device: torch.device, distributed: Distributed,
                 log: Callable[[str], None]) -> None:
        self.model, self.whole, self.device = model, whole, device
        self.distributed, self.log = distributed, log
        # a float64 model stays float64, and intervals are always float32
        low = model.dtype != torch.float64 and (recipe.attacks or not recipe.certifies) and \
            recipe.precision == "bfloat16"
        self.objective: Objective | CertifiedObjective = (
            CertifiedObjective if recipe.certifies else Objective)(model, threat, recipe, low)
        if isinstance(self.objective, Objective) and recipe.distill:
            self.objective.teacher = self._teacher(threat)
        self.parts = 1
        self.frozen_norms = [m for m in model.modules()
                             if isinstance(m, _BatchNorm) and is_frozen(m)]

    def check_precision(self, pixels: Tensor) -> None:
        """Refuse a model that does not run in bfloat16 if the recipe asks for that.

        Raises:
            SpecError: it does not run.
        """
        if not self.objective.low:
            return
        try:
            with torch.no_grad(), evaluating(self.model), seeded(0):
                answers_of(self.model, pixels, True)
        except Exception as error:  # a forward may raise anything on an unexpected type
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SpecError("the model does not run in bfloat16", why=f"Its error: {reason}",
                            fix="Use precision=float32.") from error

    def check(self, pixels: Tensor, labels: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Refuse a model that has no gradient to be trained by, before any work.

        Raises:
            ConversionError: no gradient reaches the parameters, or the images that the recipe
                attacks.
            DataError: batches have one image, and a BatchNorm needs more.
        """
        x, y = pixels[:_FEW], labels[:_FEW]
        buffers = [(b, b.detach().clone()) for b in self.model.buffers()]
        found: Sequence[Tensor | None] = ()
        try:
            with modes_restored(self.model), seeded(0):
                if self.objective.recipe.attacks:
                    with evaluating(self.model), frozen(self.model):
                        self._check_images(x, y)
                loss = self._hard(x, x, y)
                if loss.requires_grad:
                    found = torch.autograd.grad(loss, parameters, allow_unused=True)
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                return  # the first step will split its batch
            with torch.no_grad(), modes_restored(self.model), seeded(0):
                self._hard(x, x, y)  # raises again if the error is not about the gradient
            raise _untrainable(error) from error
        except ValueError as error:
            if not needs_several(error):
                raise
            raise DataError("the loader's batches have one image each, which BatchNorm cannot "
                            "normalise",
                            fix="Use batches of two images or more (--batch-size).") from error
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
        if all(g is None for g in found):
            raise ConversionError("the model cannot be trained: its gradient reaches no parameter",
                                  why="Its forward detaches what it computes, or runs under "
                                      "torch.no_grad or torch.inference_mode.",
                                  fix="Remove that from the forward.")

    def _check_images(self, x: Tensor, labels: Tensor) -> None:
        """Refuse a model whose answers depend on the images but have no gradient in them.

        Raises:
            ConversionError: there is no gradient.
        """
        recipe, model = self.objective.recipe, self.model
        with soften(model, recipe.sharpness[0]) if recipe.sharpness else nullcontext():
            # margin loss: a saturated softmax rounds the gradient of cross-entropy to zero
            gradient, logits = input_gradient(model, x, labels.clamp_min(0), "margin")
            with torch.no_grad():
                low, high = self.objective.threat.bounds
                other = model(low + (high - low) * torch.rand_like(x))
        if model.without_gradient is None and (bool((gradient != 0).any())
                                               or torch.equal(logits, other)):
            return
        raise ConversionError(
            f"the model cannot be trained by recipe {recipe.name}: its gradient reaches no image",
            why=f"torch says: {model.without_gradient}" if model.without_gradient else
            "It is zero at every pixel, although answers differ between images: its forward "
            "rounds, detaches, runs under torch.no_grad, or has a backward that returns zeros.",
            fix="Use operations that have a gradient, or recipe='clean', which does not attack.")

    def _teacher(self, threat: Threat) -> Callable[[Tensor], Tensor]:
        """Return the float parent's logits as a function of pixels."""
        parent = PixelModel(duplicate(self.model.model).eval().requires_grad_(False), threat)

        def logits(pixels: Tensor) -> Tensor:
            parent.key = self.model.key
            with torch.no_grad(), bypass(parent):
                return parent(pixels)  # type: ignore[no-any-return]
        return logits

    def __call__(self, pixels: Tensor, labels: Tensor, parameters: Sequence[nn.Parameter]) -> float:
        """Add the gradient of a batch to the parameters, and return its loss.

        A batch that does not fit into memory is split into parts, whose gradients are added.

        Raises:
            DataError: a single image does not fit into memory.
            ConversionError: torch cannot compute the gradient.
        """
        noise = self._noise(pixels) if self.objective.recipe.attacks else pixels
        count = self.distributed.total_of(len(labels))
        while True:
            rng = torch.get_rng_state()
            try:
                value = 0.0
                for x, y, start in zip(*(v.tensor_split(self.parts)
                                         for v in (pixels, labels, noise)), strict=True):
                    value += self._part(x, y, start, len(y) / count)
                self.distributed.add_gradients(parameters)
                return self.distributed.total_of(value)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise _untrainable(error) from error
                if 2 * self.parts > len(labels):
                    raise DataError("out of memory, even with one image at a time",
                                    fix="Use a smaller model or image, or another device.",
                                    ) from None
            self.parts *= 2
            for parameter in parameters:
                parameter.grad = None
            torch.set_rng_state(rng)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.log(f"out of memory: batches of {len(labels)} are computed in {self.parts} parts "
                     "from here on, and the gradients are added")

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return this process's share of the loss of a batch: attacked images, hard forward."""
        share = len(labels) / self.distributed.total_of(len(labels))
        x = self.attacked(pixels, labels, self._noise(pixels))
        return self._hard(x, pixels, labels) * share

    def attacked(self, pixels: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the attacked images of a batch.

        The label of an image that has none is the float parent's answer.
        """
        objective = self.objective
        if objective.teacher is not None and bool((labels < 0).any()):
            labels = torch.where(labels < 0, objective.teacher(pixels).argmax(1), labels)
        return attacked_images(self.model, pixels, labels, objective.attacker, objective.recipe,
                               noise, objective.low)

    def _part(self, pixels: Tensor, labels: Tensor, noise: Tensor, share: float) -> float:
        x = self.attacked(pixels, labels, noise)
        with perturbed(self.model.model, self.objective.recipe.awp,
                       lambda: self.objective(x, pixels, labels)):
            loss = self._hard(x, pixels, labels) * share
            value = float(loss.detach())
            if math.isfinite(value):
                loss.backward()  # type: ignore[no-untyped-call]
        return value

    def _hard(self, x: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
        # the statistics of frozen BatchNorms do not change
        self.model.model.train(self.whole)
        for norm in self.frozen_norms:
            norm.eval()
        return self.objective(x, pixels, labels)

    def _noise(self, pixels: Tensor) -> Tensor:
        """Draw the random start of the whole batch, and return this process's shard of it."""
        count = round(self.distributed.total_of(len(pixels)))
        return self.distributed.shard(random_start(  # type: ignore[no-any-return]
            pixels.new_empty(count, *pixels.shape[1:]), self.objective.attacker.norm))


def needs_several(error: ValueError) -> bool:
    """Return whether a BatchNorm raised the error because of a single value per channel."""
    return _ONE_VALUE in str(error)


def _untrainable(error: BaseException) -> ConversionError:
    return ConversionError("the model cannot be trained: torch does not compute its gradient",
                           why=f"torch says: {first_line(error)}",
                           fix="Use operations that loss.backward() supports.")
