"""Random numbers seeded by an image, independent of its batch, and random noise as an attack."""

from __future__ import annotations

import hashlib
from typing import Any

import eagerpy as ep
import torch
from torch import Tensor

from .base import NormBallAttack, fb


def seed_of(image: Tensor, salt: str) -> int:
    """Return a seed for one image's random numbers: a hash of the image's bytes and a salt."""
    data = image.detach().float().cpu().contiguous().numpy().tobytes()
    digest = hashlib.blake2b(data + salt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def image_noise(x: Tensor, norm: str, seed: int, tag: str) -> Tensor:
    """Return a random point for each image: uniform in the unit ball of Linf or L2, or normal.

    Args:
        x: (N, ...) images; each one's generator is seeded by a hash of its bytes, seed and tag.
        norm: ``linf`` or ``l2``, or ``normal``: N(0, 1) for each entry.
    """
    out = torch.empty(x.shape, dtype=torch.float32)
    for row, image in zip(out, x.detach().float().cpu(), strict=True):
        generator = torch.Generator().manual_seed(seed_of(image, f"{seed}:{tag}:{norm}"))
        if norm == "linf":
            row.uniform_(-1, 1, generator=generator)
            continue
        row.normal_(generator=generator)
        if norm == "l2":
            radius = torch.rand((), generator=generator) ** (1 / row.numel())
            row.mul_(radius / row.norm())
    return out.to(x.device)


class Noise(NormBallAttack):
    """Random noise of full strength, drawn several times: a baseline without any gradient.

    Args:
        norm: ``linf`` (corners of the ball and uniform draws alternate) or ``l2``.
        repeats: draws for each image.
        seed: of the draws.
    """

    def __init__(self, norm: str = "linf", repeats: int = 10, seed: int = 0) -> None:
        self.norm, self.repeats, self.seed = norm, repeats, seed

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            **kwargs: Any) -> Any:
        """Return for each image the first draw that fools the model, else the last."""
        fb.attacks.base.raise_if_kwargs(kwargs)
        x, restore = ep.astensor_(inputs)
        judge = fb.attacks.base.get_criterion(criterion)
        best, fooled = x, ep.zeros(x, len(x)).bool()
        for i in range(self.repeats):
            unit = image_noise(x.raw, self.norm, self.seed, f"noise {i}")
            if self.norm == "linf" and i % 2 == 0:
                unit = unit.sign()
            trial = ep.astensor(x.raw + epsilon * unit).clip(*model.bounds)
            best = ep.where(fb.devutils.atleast_kd(fooled, x.ndim), best, trial)
            logits = model(trial)
            no_class = ep.astensor(logits.raw.isnan().any(1))  # arg max takes NaN for class 0
            fooled = ep.logical_or(fooled, ep.logical_or(no_class, judge(trial, logits)))
        return restore(best)
