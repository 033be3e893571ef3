"""Bounds of every image's margin: intervals, linear bounds, branch and bound, and their checks."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..attacks import PGD, FoolboxModel, PixelModel
from ..attacks.base import fb
from ..attacks.losses import fools, project
from ..attacks.predictions import padded
from ..core.errors import ConversionError
from ..core.progress import Progress
from ..core.specs import Threat
from ..data.images import Images
from .branch_and_bound import branch_and_bound
from .certifier_state import BRANCHED, CertifierState
from .graph.graph import ModelGraph
from .propagation import around, check_faithful, margins, propagate
from .rules.intervals import Interval

# Images at which the model is compared with its graph before anything else, and how often: as they
# are, with all pixels darker or brighter, and at random corners of the ball.
_CHECKED, _REPEATS, _SHIFTS = 16, 5, (0.0, -1.0, 1.0)
# Intervals of small images take so many batches at a time, of so many pixels in all: whatever is
# computed from the weights is then computed less often.
_BATCHES, _PIXELS = 4, 1 << 20
# Boxes of one image that are bounded at a time: in small models calls cost more than arithmetic.
_BOXES, _ELEMENTS = 1024, 1 << 18


@dataclass
class ImageBounds:
    """The model, its graph and the images that are bounded.

    Attributes:
        graph: the model as one graph.
        model: the model that runs.
        data: the images; pixels that were snapped to a level widen the ball.
        threat: the ball.
        batch: images at a time.
        logits: (N, C) the model's answers.
        correct: (N,) which of them are right.
    """

    graph: ModelGraph
    model: PixelModel
    data: Images
    threat: Threat
    batch: int
    logits: Tensor
    correct: np.ndarray

    def check_model(self) -> None:
        """Check that the model computes what its graph says: at images and at corners of balls.

        Raises:
            ConversionError: it does not.
        """
        some, threat = self.data.pixels[:_CHECKED], self.threat
        for number in range(_REPEATS):
            signs = torch.randint(0, 2, some.shape, device=some.device) * 2.0 - 1
            signs = torch.full_like(some, _SHIFTS[number]) if number < len(_SHIFTS) else signs
            points = (some + threat.eps * signs).clamp(*threat.bounds)
            check_faithful(self.graph, points, threat, self._answers(points))

    def _answers(self, points: Tensor) -> Tensor:
        """Return the model's logits of at most one batch, computed as those of a full batch."""
        images, size = padded(points, self.batch)
        answers: Tensor = self.model(images)[:size]
        return answers

    def bound(self, method: str, state: CertifierState, bar: Progress) -> None:
        """Bound all images by intervals; then, as method says, some by linear bounds."""
        kinds = ["ibp"] if method == "ibp" else ["ibp", "crown"]
        for number, kind in enumerate(kinds):
            wanted = state.done == number
            if kind == "crown":
                wanted &= self.correct if method == "crown" else self.correct & ~(state.lower > 0)
                bar.extend(int(wanted.sum()))
            chosen = np.flatnonzero(wanted)
            per_call = self.batch if kind == "crown" else \
                max(self.batch, min(_BATCHES * self.batch, _PIXELS // self.data.pixels[0].numel()))
            for start in range(0, len(chosen), per_call):
                if state.out_of_time:
                    return
                rows = chosen[start : start + per_call]
                gaps = self._linear(rows) if kind == "crown" else self._intervals(rows, state)
                lower = gaps.amin(1).nan_to_num(-np.inf, np.inf, -np.inf)
                state.lower[rows] = np.maximum(state.lower[rows], lower.cpu().numpy())
                state.done[rows] = number + 1
                state.save()
                bar.advance(len(rows), f"{state.certified} certified")

    def _linear(self, rows: np.ndarray) -> Tensor:
        """Return linear bounds of the margins of some images, (N, C)."""
        ball = around(self.data.pixels[rows], self.threat, self.data.snapped)
        logits = propagate(self.graph, ball, taped=True)
        return margins(logits, self.data.labels[rows], True)

    def _intervals(self, rows: np.ndarray, state: CertifierState) -> Tensor:
        """Return interval bounds of the margins of some images, (N, C), and check them."""
        ball = around(self.data.pixels[rows], self.threat, self.data.snapped, brief=True)
        logits = propagate(self.graph, ball, False, functools.partial(state.count, self.graph))
        gaps = margins(logits, self.data.labels[rows], False)
        self._check_answers(logits, gaps, rows)
        return gaps

    def _check_answers(self, bounds: Interval, gaps: Tensor, rows: np.ndarray) -> None:
        """Check that the model's own answers lie within the bounds.

        At the images, and at a random corner of the ball of those of the first batch. This holds by
        proof, unless the model is not what its graph says.

        Args:
            bounds, gaps: of the logits and of the margins (N, C) of these rows.

        Raises:
            ConversionError: an answer lies outside.
        """
        pixels, labels = self.data.pixels[rows[: self.batch]], self.data.labels[rows].unsqueeze(1)
        threat = self.threat
        signs = torch.randint(0, 2, pixels.shape, device=pixels.device) * 2.0 - 1
        length = 1.0 if threat.norm == "linf" else pixels[0].numel() ** -0.5
        corner = (pixels + threat.eps * length * signs).clamp(*threat.bounds)
        at_corner = self._answers(corner)
        check_faithful(self.graph, corner[:1], threat, at_corner[:1])
        for answer in (self.logits[rows].double(), at_corner.double()):
            n = len(answer)
            outside = (answer < bounds.lower[:n]) | (answer > bounds.upper[:n])
            other = torch.ones_like(outside).scatter_(1, labels[:n], False)
            outside |= other & (answer.gather(1, labels[:n]) - answer < gaps[:n])
            if outside.any():
                image = rows[int(outside.any(1).nonzero()[0])]
                raise ConversionError(
                    f"the model's own answer for image {image} lies outside its bounds",
                    why="Its forward is not what its graph says: it may branch on values, keep "
                        "state between calls, or run in less than float32.",
                    fix="This model cannot be certified as it is.")

    def branch(self, max_boxes: int, state: CertifierState, bar: Progress) -> None:
        """Split the balls of images that are undecided and that a short attack does not break."""
        undecided = self.correct & ~(state.lower > 0)
        chosen = np.flatnonzero(undecided & (state.done >= 1) & (state.done < BRANCHED))
        bar.extend(len(chosen))
        for start in range(0, len(chosen), self.batch):
            if state.out_of_time:
                return
            rows = chosen[start : start + self.batch]
            survives = self._survives(rows)
            for row in rows[survives]:
                lower = self._split(row, max_boxes, state)
                state.lower[row] = max(state.lower[row], lower)
                if not state.out_of_time:
                    state.done[row] = BRANCHED
                state.save()
                bar.advance(1, f"{state.certified} certified")
            state.done[rows[~survives]] = BRANCHED
            bar.advance(int((~survives).sum()), f"{state.certified} certified")

    def _survives(self, rows: np.ndarray) -> np.ndarray:
        """Return which of at most one batch of images survive a short attack."""
        (x, size), (y, _) = (padded(v[rows], self.batch)
                             for v in (self.data.pixels, self.data.labels))
        attack = PGD("margin", 50, rel_step=0.4, decay=True, sharpness=(2, 16))
        with torch.enable_grad():
            found = attack.run(FoolboxModel(self.model, self.threat), x,
                               fb.criteria.Misclassification(y), epsilon=self.threat.eps)
        survives: np.ndarray = (~fools(self.model(self._projected(found, x)), y))[:size] \
            .cpu().numpy()
        return survives

    def _projected(self, images: Tensor, x: Tensor) -> Tensor:
        return project(images, x, self.threat.eps, self.threat.norm, self.threat.bounds)

    def _split(self, row: int, max_boxes: int, state: CertifierState) -> float:
        """Return what branch and bound finds for one image."""
        image, label = self.data.pixels[row : row + 1], self.data.labels[row : row + 1]
        per_call = max(self.batch, min(_BOXES, _ELEMENTS // image.numel()))

        def broken(images: Tensor) -> bool:
            answers = self.model(self._projected(images, image.expand_as(images)))
            return bool(fools(answers, label).any())

        def out_of_time() -> bool:
            return state.out_of_time
        ball = around(image, self.threat, self.data.snapped)
        return branch_and_bound(self.graph, ball, label, max_boxes, per_call, broken, out_of_time)
