"""One batch of a fine-tune: attack its images, and leave the gradient of its loss in the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .attacks import PixelModel
from .attacks.losses import input_gradient
from .certifying import CertifiedObjective
from .contexts import bypass, soften
from .crafting import (
    Objective,
    answers_of,
    craft,
    perturbed,
    random_start,
)
from .errors import ConversionError, DataError, SpecError
from .probing import is_frozen
from .recipes import Recipe
from .running import (
    duplicate,
    evaluating,
    first_line,
    frozen,
    modes_kept,
    out_of_memory,
    seeded,
)
from .spec import Threat
from .world import World

# Images that are enough to see whether a gradient reaches them, and the weights.
_FEW = 8
# What torch says where one image leaves a BatchNorm no variance.
_ONE_VALUE = "Expected more than 1 value per channel"


class Gradients:
    """Leave the gradient of a batch's loss in the parameters of a model.

    Args:
        model: what is trained.
        threat, recipe: the attacker, and what the loss is made of.
        whole: whether all of the model is trained, BatchNorm statistics too.
        device: where batches are.
        world: the processes that share a batch.
        say: is told what went wrong.

    Attributes:
        objective: the loss of attacked images; holds the recipe, which may change, and whether the
            network runs in bfloat16.
        parts: into how many a batch is cut that does not fit into memory.
    """

    def __init__(self, model: PixelModel, threat: Threat, recipe: Recipe, whole: bool,
                 device: torch.device, world: World, say: Callable[[str], None]) -> None:
        self.model, self.whole, self.device, self.world, self.say = model, whole, device, world, say
        # who asks for digits gets them; intervals alone are float32
        low = model.dtype != torch.float64 and (recipe.attacks or not recipe.certifies) and \
            recipe.precision == "bfloat16"
        self.objective: Objective | CertifiedObjective = (
            CertifiedObjective if recipe.certifies else Objective)(model, threat, recipe, low)
        if isinstance(self.objective, Objective) and recipe.distill:
            self.objective.teacher = self._teacher(threat)
        self.parts = 1
        self.frozen_norms = [m for m in model.modules()
                             if isinstance(m, _BatchNorm) and is_frozen(m)]

    def look(self, pixels: Tensor) -> None:
        """Refuse a model that does not run on pixels in the recipe's bfloat16.

        Raises:
            SpecError: it does not.
        """
        if not self.objective.low:
            return
        try:
            with torch.no_grad(), evaluating(self.model), seeded(0):
                answers_of(self.model, pixels, True)
        except Exception as error:  # whatever a forward raises on a type it was not made for
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SpecError("the model does not run in bfloat16", why=f"It says: {said}",
                            fix="Use precision=float32.") from error

    def check(self, pixels: Tensor, labels: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Refuse, before any work, a model that has no gradient to be trained by.

        Raises:
            ConversionError: none reaches the parameters, or, where the recipe attacks, the images.
            DataError: batches of one image, and a BatchNorm that needs more.
        """
        x, y = pixels[:_FEW], labels[:_FEW]
        buffers = [(b, b.detach().clone()) for b in self.model.buffers()]
        found: Sequence[Tensor | None] = ()
        try:
            with modes_kept(self.model), seeded(0):
                if self.objective.recipe.attacks:
                    with evaluating(self.model), frozen(self.model):
                        self._check_images(x, y)
                loss = self._hard(x, x, y)
                if loss.requires_grad:
                    found = torch.autograd.grad(loss, parameters, allow_unused=True)
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                return  # the first step will cut its batch
            with torch.no_grad(), modes_kept(self.model), seeded(0):
                self._hard(x, x, y)  # raises again where the gradient is not what is missing
            raise _untrainable(error) from error
        except ValueError as error:
            if not needs_several(error):
                raise
            raise DataError("the loader's batches have one image each, which leaves BatchNorm "
                            "nothing to normalise by",
                            fix="Use batches of two images or more (--batch-size).") from error
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
        if all(g is None for g in found):
            raise ConversionError("the model cannot be trained: its gradient reaches no parameter",
                                  why="Its forward detaches what it computes, or runs under "
                                      "torch.no_grad or torch.inference_mode.",
                                  fix="Take that out of the forward.")

    def _check_images(self, x: Tensor, labels: Tensor) -> None:
        """Refuse a model that answers its images, and has no gradient in them.

        Raises:
            ConversionError: such a one.
        """
        recipe, model = self.objective.recipe, self.model
        with soften(model, recipe.sharpness[0]) if recipe.sharpness else nullcontext():
            # of the margin: a saturated softmax rounds cross-entropy's gradient to zero by itself
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
            "It is zero at every pixel, and yet the answers are not the same for all images: "
            "something in its forward rounds, detaches, runs under torch.no_grad or has a backward "
            "of zeros.",
            fix="Compute it by operations that have a gradient, or use recipe='clean', which "
                "attacks nothing.")

    def _teacher(self, threat: Threat) -> Callable[[Tensor], Tensor]:
        """Return the float parent's logits as a function of pixels."""
        parent = PixelModel(duplicate(self.model.model).eval().requires_grad_(False), threat)

        def logits(pixels: Tensor) -> Tensor:
            parent.key = self.model.key
            with torch.no_grad(), bypass(parent):
                return parent(pixels)  # type: ignore[no-any-return]
        return logits

    def __call__(self, pixels: Tensor, labels: Tensor, parameters: Sequence[nn.Parameter]) -> float:
        """Leave the gradient of a batch in the parameters, and return its loss.

        A batch that does not fit into memory is cut into parts, whose gradients add up.

        Raises:
            DataError: one image does not fit.
            ConversionError: torch cannot compute the gradient.
        """
        noise = self._noise(pixels) if self.objective.recipe.attacks else pixels
        count = self.world.total_of(len(labels))
        while True:
            rng = torch.get_rng_state()
            try:
                value = 0.0
                for x, y, start in zip(*(v.tensor_split(self.parts)
                                         for v in (pixels, labels, noise)), strict=True):
                    value += self._part(x, y, start, len(y) / count)
                self.world.add_gradients(parameters)
                return self.world.total_of(value)
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
            self.say(f"out of memory: batches of {len(labels)} go through in {self.parts} parts "
                     "from here on, their gradients added")

    def loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Return this process's share of the loss of a batch: attacked images, hard forward."""
        share = len(labels) / self.world.total_of(len(labels))
        return self._hard(self.crafted(pixels, labels, self._noise(pixels)), pixels, labels) * share

    def crafted(self, pixels: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the attacked images of a batch; an image without a label keeps its answer."""
        objective = self.objective
        if objective.teacher is not None and bool((labels < 0).any()):
            labels = torch.where(labels < 0, objective.teacher(pixels).argmax(1), labels)
        return craft(self.model, pixels, labels, objective.attacker, objective.recipe, noise,
                     objective.low)

    def _part(self, pixels: Tensor, labels: Tensor, noise: Tensor, share: float) -> float:
        x = self.crafted(pixels, labels, noise)
        with perturbed(self.model.model, self.objective.recipe.awp,
                       lambda: self.objective(x, pixels, labels)):
            loss = self._hard(x, pixels, labels) * share
            value = float(loss.detach())
            if math.isfinite(value):
                loss.backward()  # type: ignore[no-untyped-call]
        return value

    def _hard(self, x: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
        # what is frozen keeps its BatchNorm statistics, too
        self.model.model.train(self.whole)
        for norm in self.frozen_norms:
            norm.eval()
        return self.objective(x, pixels, labels)

    def _noise(self, pixels: Tensor) -> Tensor:
        """Draw the random start of the whole batch, whichever part of it is here."""
        count = round(self.world.total_of(len(pixels)))
        return self.world.part(random_start(  # type: ignore[no-any-return]
            pixels.new_empty(count, *pixels.shape[1:]), self.objective.attacker.norm))


def needs_several(error: ValueError) -> bool:
    """Return whether an error is a BatchNorm's that got a single value for a channel."""
    return _ONE_VALUE in str(error)


def _untrainable(error: BaseException) -> ConversionError:
    return ConversionError("the model cannot be trained: torch does not compute its gradient",
                           why=f"torch says: {first_line(error)}",
                           fix="Compute it by operations that loss.backward() can go through.")
