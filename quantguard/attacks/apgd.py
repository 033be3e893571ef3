"""Auto-PGD through quantizers: momentum, and a step size that is halved when progress is slow.

Croce, Hein 2020, arXiv:2003.01690, algorithm 1. As in the authors' code, a checkpoint is processed
as soon as its iterate is evaluated, one step earlier than printed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import SpecError
from .gradient_attack import BestFound, GradientAttack
from .losses import ascend, image_losses, input_gradient, project
from .pixel_model import PixelModel

# Weight of the new step; the rest repeats the step before.
_ALPHA = 0.75
# First step over eps, and rho: the paper's, and those for the softened model, which gets sharper
# from one checkpoint to the next, so that steps have to shrink with it. In 12 runs on 1- and 2-bit
# LeNets of Fashion-MNIST, 706 of 1288 images survived with the paper's and 688 with these.
_PAPER, _SOFTENED = (2.0, 0.75), (1.0, 0.9)


def checkpoints(steps: int) -> list[int]:
    """Return the iterations, ascending from 0, at which progress is checked.

    Section 3: ``w_j = ceil(p_j steps)``, below steps, with ``p_0 = 0``, ``p_1 = 0.22``,
    ``p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)``; in hundredths, so that nothing is rounded.
    """
    before, p, found = 0, 22, {0}
    while -(-p * steps // 100) < steps:
        found.add(-(-p * steps // 100))
        before, p = p, p + max(p - before - 3, 6)
    return sorted(found)


class APGD(GradientAttack):
    """Auto-PGD, which chooses its step size; every iterate is judged by the original model.

    Progress is measured on the surrogate's loss. The original loss is piecewise constant: most
    steps do not raise it, and every step size would be halved. With ``sharpness`` the softened
    model changes at checkpoints only, growing geometrically sharper with the steps made. There the
    loss of the best point is evaluated again, as losses at two sharpnesses cannot be compared.

    Args:
        loss: ``ce``, ``margin`` or ``dlr``, see :func:`quantguard.attacks.losses.image_losses`.
        steps: gradient steps; with ``sharpness`` each of the up to 8 checkpoints takes one more
            forward pass.
        rel_step: first step's length over eps; None: 2, or 1 with ``sharpness``.
        rho: share of the steps between two checkpoints that must raise the loss, 0 to 1; with
            fewer, the step size is halved; None: 0.75, or 0.9 with ``sharpness``.
        mode: backward mode of the quantizers.
        sharpness: sharpness of the softened model before the first and after the last checkpoint;
            None: surrogate gradients instead of the softened model.
        norm: ``linf`` or ``l2``.
        noise: radius of the random start over eps, 0 to 1.
        target: with ``margin`` and ``dlr``: rank, from 1, among the wrong classes at the image of
            the class to attack towards; 0: any wrong class.
        restart: start around ``starting_points`` where they are passed, instead of the image.
        bpda, by_image: as of :class:`quantguard.attacks.pgd.PGD`.
        seed: of the start.

    Raises:
        SpecError: an unknown loss or norm, or numbers out of range.
    """

    losses = ("ce", "margin", "dlr")

    def __init__(self, loss: str = "ce", steps: int = 50, *, rel_step: float | None = None,
                 rho: float | None = None, mode: str = "ramp",
                 sharpness: tuple[float, float] | None = None, norm: str = "linf",
                 noise: float = 1.0, target: int = 0, restart: bool = False, bpda: bool = True,
                 by_image: bool = False, seed: int = 0) -> None:
        super().__init__(loss, steps, mode=mode, sharpness=sharpness, norm=norm, noise=noise,
                         target=target, restart=restart, bpda=bpda, by_image=by_image, seed=seed)
        default_step, default_rho = _PAPER if sharpness is None else _SOFTENED
        self.rel_step = default_step if rel_step is None else rel_step
        self.rho = default_rho if rho is None else rho
        if self.rel_step <= 0 or not 0 <= self.rho <= 1:
            raise SpecError(f"rel_step={rel_step} must be positive, and rho={rho} from 0 to 1")

    def _tag(self) -> str:
        return f"apgd {self.loss} {self.mode} {self.sharpness}"

    def _maximise(self, module: PixelModel, x0: Tensor, x: Tensor, labels: Tensor,
                  target: Tensor | None, eps: float, bounds: tuple[float, float]) -> BestFound:
        def column(values: Tensor) -> Tensor:
            return values.reshape(-1, *[1] * (x.dim() - 1))

        found, same_logits = BestFound(x, labels), self._judges_itself(module)
        marks = checkpoints(self.steps)
        # eta: step sizes; f: the loss at x; best, slope, f_max: the point with the highest loss,
        # its gradient and its loss; f_mark, halved: f_max, and whether eta was halved, at the last
        # checkpoint.
        eta = x.new_full(x.shape[:1], self.rel_step * eps)
        f, f_max, rises = torch.full_like(eta, torch.inf), torch.full_like(eta, -torch.inf), 0 * eta
        f_mark, halved = f_max, torch.zeros_like(found.already_fooled)
        before, best, slope, mark, progress = x, x, torch.zeros_like(x), 0, 0.0
        for step in range(self.steps):
            with self._surrogate(module, progress):
                gradient, logits = input_gradient(module, x, labels, self.loss, target)
            height = image_losses(logits, labels, self.loss, target)
            if not same_logits:
                with torch.no_grad():
                    logits = module(x)
            found.judge(x, logits)
            if bool(found.already_fooled.all()):
                return found
            rows = found.survivors()
            if rows is not None:
                x, x0, labels, before, best, slope, gradient = (
                    v[rows] for v in (x, x0, labels, before, best, slope, gradient))
                eta, f, f_max, rises, f_mark, halved, height = (
                    v[rows] for v in (eta, f, f_max, rises, f_mark, halved, height))
                target = None if target is None else target[rows]
            up, rises = height > f_max, rises + (height > f)
            f, f_max = height, torch.where(up, height, f_max)
            best, slope = torch.where(column(up), x, best), torch.where(column(up), gradient, slope)
            if step in marks:
                few = rises < self.rho * (step - mark)  # condition 1
                halved = few | (~halved & (f_max == f_mark))  # condition 2
                eta = torch.where(halved, eta / 2, eta)
                # slope is of the old sharpness: the small difference is not worth a gradient
                gradient = torch.where(column(halved), slope, gradient)
                x, f = torch.where(column(halved), best, x), torch.where(halved, f_max, f)
                if step and not same_logits:
                    progress = step / marks[-1]
                    with torch.no_grad(), self._surrogate(module, progress):
                        f_max = image_losses(module(best), labels, self.loss, target)
                    f = f_max  # the loss at x would take another forward; x mostly is the best
                f_mark, mark, rises = f_max, step, 0 * rises
            new = project(x + column(eta) * ascend(gradient, self.norm), x0, eps, self.norm, bounds)
            if step:  # the first step has none before it
                new = x + _ALPHA * (new - x) + (1 - _ALPHA) * (x - before)
            before, x = x, project(new, x0, eps, self.norm, bounds)
        with torch.no_grad():
            found.judge(x, module(x))
        return found
