"""Transfer attack: PGD on a substitute model trained on the attacked model's predictions.

Papernot, McDaniel, Goodfellow, Jha, Celik, Swami 2017, arXiv:1602.02697, algorithm 1, with a limit
on the queries as in Papernot, McDaniel, Goodfellow 2016, arXiv:1605.07277.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import eagerpy as ep
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import SpecError
from ..core.runtime import seeded
from ..data.batches import check_images
from .base import NormBallAttack, check_norm, fb
from .foolbox_model import labels_of, module_of
from .losses import ascend, height, input_gradient, project
from .noise import image_noise, seed_of
from .pixel_model import PixelModel

_LOSSES = ("ce", "margin")
# Images in one forward pass, and in one training step.
_CHUNK, _BATCH = 128, 64
# The stride of the first convolution reduces large images to about this side length.
_SIDE = 32


class Net(nn.Module):
    """Small classifier: two convolutions, or a linear layer for other shapes, and a hidden layer.

    Args:
        shape: of one image, (C, H, W); any other shape is flattened.
        classes: number of classes of the attacked model.
        bounds: of the pixels.
    """

    def __init__(self, shape: torch.Size, classes: int, bounds: tuple[float, float]) -> None:
        super().__init__()
        self.middle, self.radius = (bounds[0] + bounds[1]) / 2, (bounds[1] - bounds[0]) / 2
        if len(shape) == 3:
            k = max(1, min(shape[1:]) // _SIDE)
            features = nn.Sequential(
                nn.Conv2d(shape[0], 16, 2 * k + 3, k, k + 1), nn.ReLU(),
                nn.MaxPool2d(2, ceil_mode=True),
                nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True),
                nn.Flatten())
        else:
            features = nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), 256), nn.ReLU())
        with torch.no_grad():
            width = features(torch.zeros(1, *shape)).shape[1]
        self.layers = nn.Sequential(features, nn.Linear(width, 128), nn.ReLU(),
                                    nn.Linear(128, classes))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        logits: Tensor = self.layers((pixels - self.middle) / self.radius)
        return logits


class Substitute(NormBallAttack):
    """PGD on a substitute that was trained only on the classes predicted by the attacked model.

    Call :meth:`fit` first, with the attacker's own images. After that the result of an image does
    not depend on the rest of its batch. Every iterate is judged by the attacked model.

    Args:
        steps: gradient steps on the substitute, for each loss.
        losses: maximised one after the other, each on the survivors so far: ``ce``, ``margin``.
        norm: ``linf`` or ``l2``.
        rel_step: step's length over eps.
        noise: radius of the random start over eps, 0 to 1.
        rounds: number of times that the training images are doubled, by steps along the
            substitute's Jacobian.
        step: length of these steps in each pixel, over the range of pixels; the sign alternates
            from round to round, towards the predicted class and away from it.
        epochs: of training in each round.
        limit: training images of the substitute, at most; each is one query.
        seed: of everything random.

    Raises:
        SpecError: an unknown loss or norm, or numbers out of range.

    Example:
        >>> attack = Substitute()
        >>> attack.fit(fmodel, images)  # doctest: +SKIP
        >>> attack(fmodel, images, labels, epsilons=0.1)  # doctest: +SKIP
    """

    def __init__(self, steps: int = 40, *, losses: Sequence[str] = _LOSSES, norm: str = "linf",
                 rel_step: float = 0.1, noise: float = 1.0, rounds: int = 4, step: float = 0.1,
                 epochs: int = 5, limit: int = 6400, seed: int = 0) -> None:
        if not losses or not set(losses) <= set(_LOSSES):
            raise SpecError(f"losses={losses!r} must be one or more of {', '.join(_LOSSES)}")
        check_norm(norm)
        if steps < 1 or epochs < 1 or limit < 1 or rounds < 0:
            raise SpecError(f"steps={steps}, epochs={epochs} and limit={limit} must be at least 1, "
                            f"and rounds={rounds} 0 or more")
        if not rel_step > 0 or not 0 <= noise <= 1 or not 0 <= step <= 1:
            raise SpecError(f"rel_step={rel_step} must be above 0, and noise={noise} and "
                            f"step={step} from 0 to 1")
        self.steps, self.losses, self.norm, self.rel_step = steps, tuple(losses), norm, rel_step
        self.noise, self.rounds, self.step, self.epochs = noise, rounds, step, epochs
        self.limit, self.seed = limit, seed
        self._net: Net | None = None
        self._agreement = 0.0

    @property
    def agreement(self) -> float:
        """Return the share of holdout images on which the substitute predicts the model's class.

        The holdout is a tenth of the images passed to :meth:`fit`.
        """
        self._fitted()
        return self._agreement

    def _fitted(self) -> Net:
        if self._net is None:
            raise SpecError("Substitute has not been fitted to the model yet",
                            fix="Call fit(model, images) first, once for each model.")
        return self._net

    def fit(self, model: Any, images: Any) -> None:
        """Train the substitute on the model's predicted classes.

        Args:
            model: a :class:`FoolboxModel`.
            images: (M, ...) pixels of the attacker's own images, in any order. A tenth is held
                out, for ``agreement``.

        Raises:
            DataError: images outside the bounds.
        """
        x: Tensor = ep.astensor(images).raw.detach()
        module, bounds = module_of(model), model.bounds
        check_images(x, bounds, "images to fit a substitute on")
        order = sorted(range(len(x)), key=lambda i: seed_of(x[i], f"{self.seed} substitute"))
        holdout = x[order[:max(1, len(x) // 10)]]
        x = x[order[len(holdout):]][:self.limit] if len(x) > 1 else x
        y, classes = _predict(module, x)
        with seeded(self.seed), torch.enable_grad(), \
                torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            net = Net(x.shape[1:], classes, (bounds[0], bounds[1])).to(x.device)
            for number in range(self.rounds + 1):
                self._train(net, x, y)
                count = min(len(x), self.limit - len(x))
                if number == self.rounds or not count:
                    break
                some = torch.randperm(len(x))[:count].to(x.device)
                length = self.step * (bounds[1] - bounds[0]) * (-1) ** number
                # The Jacobian of the class's probability has the same signs as its logarithm's.
                new = torch.cat([
                    (a - length * input_gradient(net, a, b, "ce")[0].sign()).clamp(*bounds)
                    for a, b in zip(torch.split(x[some], _CHUNK), torch.split(y[some], _CHUNK),
                                    strict=True)])
                x, y = torch.cat([x, new]), torch.cat([y, _predict(module, new)[0]])
        self._net = net.eval().requires_grad_(False)
        same = _predict(net, holdout)[0] == _predict(module, holdout)[0]
        self._agreement = float(same.float().mean())

    def _train(self, net: Net, x: Tensor, y: Tensor) -> None:
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for _ in range(self.epochs):
            for rows in torch.split(torch.randperm(len(x)).to(x.device), _BATCH):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            **kwargs: Any) -> Any:
        """Return for each image the first point that fools the model, else the strongest.

        Raises:
            SpecError: :meth:`fit` has not been called.
        """
        fb.attacks.base.raise_if_kwargs(kwargs)
        wrapped, restore = ep.astensor_(inputs)
        found = self._maximise(module_of(model), self._fitted(), wrapped.raw, labels_of(criterion),
                               epsilon, model.bounds)
        return restore(ep.astensor(found))

    def _maximise(self, module: PixelModel, net: Net, x: Tensor, labels: Tensor, eps: float,
                  bounds: tuple[float, float]) -> Tensor:
        best, highest = x.clone(), torch.full(x.shape[:1], -torch.inf, device=x.device)
        for loss in self.losses:
            rows = (highest <= 0).nonzero().squeeze(1)
            unit = image_noise(x[rows], self.norm, self.seed, f"substitute {loss}")
            point = project(x[rows] + self.noise * eps * unit, x[rows], eps, self.norm, bounds)
            for number in range(self.steps + 1):
                with torch.no_grad():
                    new = height(module(point), labels[rows])
                better = new > highest[rows]
                best[rows[better]], highest[rows[better]] = point[better], new[better]
                survivors = highest[rows] <= 0
                rows, point = rows[survivors], point[survivors]
                if number == self.steps or not len(rows):
                    break
                gradient, _ = input_gradient(net, point, labels[rows], loss)
                step = self.rel_step * eps * ascend(gradient, self.norm)
                point = project(point + step, x[rows], eps, self.norm, bounds)
        return best


@torch.no_grad()
def _predict(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Return a model's predicted classes (N,), and its number of classes."""
    logits = [model(chunk) for chunk in torch.split(x, _CHUNK)]
    return torch.cat([z.argmax(1) for z in logits]), logits[0].shape[1]
