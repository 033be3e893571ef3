"""Auto-PGD through a staircase: momentum, and steps halved where the climb comes to little.

Croce, Hein 2020, arXiv:2003.01690, algorithm 1; as their code does, a checkpoint is kept as soon as
its iterate is evaluated, one move earlier than printed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SpecError
from .bridge import PixelModel
from .losses import ascend, image_losses, input_gradient, project
from .pgd import Climb, Kept

# How much of a move is the new step; the rest repeats the move before.
_ALPHA = 0.75
# First step over eps, and rho: the paper's; and through the twin, where what is climbed gets finer
# from one checkpoint to the next, so that steps have to shrink with it. Of 1288 images, those of 12
# runs on 1- and 2-bit LeNets of Fashion-MNIST, 706 stood with the paper's and 688 with these.
_PAPERS, _TWINS = (2.0, 0.75), (1.0, 0.9)


def checkpoints(steps: int) -> list[int]:
    """Return the iterations, ascending from 0, at which the climb is looked at.

    Section 3: ``w_j = ceil(p_j steps)``, below steps, with ``p_0 = 0``, ``p_1 = 0.22``,
    ``p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)``; in hundredths, so that nothing is rounded.
    """
    before, p, found = 0, 22, {0}
    while -(-p * steps // 100) < steps:
        found.add(-(-p * steps // 100))
        before, p = p, p + max(p - before - 3, 6)
    return sorted(found)


class APGD(Climb):
    """Auto-PGD: no step size to choose. Every iterate is judged by the model as it is.

    What is watched is what is climbed, not what is judged: the hard loss is a staircase, on which
    most steps raise nothing and every step size would be halved. With ``twin`` the sharpness is
    constant between checkpoints and grows geometrically with the steps made, at checkpoints, where
    the loss of the best point is computed anew: losses at two sharpnesses cannot be compared.

    Args:
        loss: ``ce``, ``margin`` or ``dlr``, see :func:`quantguard.attacks.losses.image_losses`.
        steps: gradient steps; with a twin each of the up to 8 checkpoints takes one more forward.
        rel_step: first step's length over eps; None: 2, or 1 with a twin.
        rho: the share of steps between two checkpoints that must raise the loss, 0 to 1, or steps
            are halved; None: 0.75, or 0.9 with a twin.
        mode: backward mode of the staircases.
        twin: sharpness before the first and after the last checkpoint; None: no twin.
        norm: ``linf`` or ``l2``.
        noise: radius of the random start over eps, 0 to 1.
        target: with ``margin`` and ``dlr``: climb towards the class that comes so-and-so many-th,
            from 1, among the wrong ones at the image; 0: away from the true one.
        restart: start around ``starting_points`` where they are given, instead of the image.
        see_through: while climbing, max-pool before a staircase instead of after it, and give
            foreign rounding a gradient; see :func:`quantguard.pooling.pools_first` and
            :func:`quantguard.straight.straight_through`.
        by_image: as of :class:`PGD`.
        seed: of the start.

    Raises:
        SpecError: an unknown loss or norm, or numbers out of range.
    """

    losses = ("ce", "margin", "dlr")

    def __init__(self, loss: str = "ce", steps: int = 50, *, rel_step: float | None = None,
                 rho: float | None = None, mode: str = "ramp",
                 twin: tuple[float, float] | None = None, norm: str = "linf", noise: float = 1.0,
                 target: int = 0, restart: bool = False, see_through: bool = True,
                 by_image: bool = False, seed: int = 0) -> None:
        super().__init__(loss, steps, mode=mode, twin=twin, norm=norm, noise=noise, target=target,
                         restart=restart, see_through=see_through, by_image=by_image, seed=seed)
        first, share = _PAPERS if twin is None else _TWINS
        self.rel_step = first if rel_step is None else rel_step
        self.rho = share if rho is None else rho
        if self.rel_step <= 0 or not 0 <= self.rho <= 1:
            raise SpecError(f"rel_step={rel_step} must be positive, and rho={rho} from 0 to 1")

    def _tag(self) -> str:
        return f"apgd {self.loss} {self.mode} {self.twin}"

    def _climb(self, module: PixelModel, x0: Tensor, x: Tensor, labels: Tensor,
               target: Tensor | None, eps: float, bounds: tuple[float, float]) -> Kept:
        def column(values: Tensor) -> Tensor:
            return values.reshape(-1, *[1] * (x.dim() - 1))

        kept, hard, marks = Kept(x, labels), self._hard(module), checkpoints(self.steps)
        # eta: steps' length; f: the loss at x; best, slope, f_max: the highest point, its gradient
        # and its loss; f_mark, halved: f_max at the last mark, and whether eta was halved there.
        eta = x.new_full(x.shape[:1], self.rel_step * eps)
        f, f_max, rises = torch.full_like(eta, torch.inf), torch.full_like(eta, -torch.inf), 0 * eta
        f_mark, halved = f_max, torch.zeros_like(kept.fallen)
        before, best, slope, mark, share = x, x, torch.zeros_like(x), 0, 0.0
        for step in range(self.steps):
            with self._climbed(module, share):
                gradient, logits = input_gradient(module, x, labels, self.loss, target)
            height = image_losses(logits, labels, self.loss, target)
            if not hard:
                with torch.no_grad():
                    logits = module(x)
            kept.judge(x, logits)
            if bool(kept.fallen.all()):
                return kept
            keep = kept.standing()
            if keep is not None:
                x, x0, labels, before, best, slope, gradient = (
                    v[keep] for v in (x, x0, labels, before, best, slope, gradient))
                eta, f, f_max, rises, f_mark, halved, height = (
                    v[keep] for v in (eta, f, f_max, rises, f_mark, halved, height))
                target = None if target is None else target[keep]
            up, rises = height > f_max, rises + (height > f)
            f, f_max = height, torch.where(up, height, f_max)
            best, slope = torch.where(column(up), x, best), torch.where(column(up), gradient, slope)
            if step in marks:
                few = rises < self.rho * (step - mark)  # condition 1
                halved = few | (~halved & (f_max == f_mark))  # condition 2
                eta = torch.where(halved, eta / 2, eta)
                # slope stays as it was found: one notch of sharpness is not worth a gradient
                gradient = torch.where(column(halved), slope, gradient)
                x, f = torch.where(column(halved), best, x), torch.where(halved, f_max, f)
                if step and not hard:
                    share = step / marks[-1]
                    with torch.no_grad(), self._climbed(module, share):
                        f_max = image_losses(module(best), labels, self.loss, target)
                    f = f_max  # x's own would take another forward; mostly x is the best
                f_mark, mark, rises = f_max, step, 0 * rises
            new = project(x + column(eta) * ascend(gradient, self.norm), x0, eps, self.norm, bounds)
            if step:  # the first has no move before it
                new = x + _ALPHA * (new - x) + (1 - _ALPHA) * (x - before)
            before, x = x, project(new, x0, eps, self.norm, bounds)
        with torch.no_grad():
            kept.judge(x, module(x))
        return kept
