"""What a fine-tune did, epoch by epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Epoch:
    """Hold what one epoch did: mean loss, and accuracies on the held-out slice (None: no slice).

    ``probe`` is the attacked one, or what intervals certify where the recipe is ``ibp``, or the
    clean one where it attacks nothing.
    """

    epoch: int
    loss: float | None
    clean: float | None
    probe: float | None
    lr: float
    seconds: float


@dataclass(frozen=True)
class History:
    """Hold a whole fine-tune.

    Attributes:
        epochs: what each epoch did; epoch 0 is the start.
        chosen: the epoch whose weights were returned.
        lr: peak learning rate of weights.
        levels: how many of its levels each staircase took on the held-out slice, at the end.
        events: what went wrong on the way, and what was done about it.
        precision: in which the network ran.
    """

    epochs: tuple[Epoch, ...]
    chosen: int
    lr: float
    levels: dict[str, int]
    events: tuple[str, ...] = ()
    precision: str = "float32"

    @property
    def kept(self) -> Epoch:
        """Return the epoch whose weights were returned."""
        return next(e for e in self.epochs if e.epoch == self.chosen)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"epochs": [vars(e) for e in self.epochs], "chosen": self.chosen, "lr": self.lr,
                "levels": self.levels, "events": list(self.events), "precision": self.precision}
