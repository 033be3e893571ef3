"""Result of a fine-tune, epoch by epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Epoch:
    """Result of one epoch. Accuracies are those of the held-out slice; None: there is none.

    Attributes:
        epoch: its number; 0 is the model before training.
        loss: mean training loss; None for epoch 0.
        clean: clean accuracy.
        validation: accuracy under the validation attack; of ``ibp`` the share of images that
            intervals certify; for a recipe without an attack the clean accuracy.
        lr: peak learning rate of the weights.
        seconds: how long it took.
    """

    epoch: int
    loss: float | None
    clean: float | None
    validation: float | None
    lr: float
    seconds: float


@dataclass(frozen=True)
class History:
    """Result of a whole fine-tune.

    Attributes:
        epochs: one entry per epoch; epoch 0 is the model before training.
        chosen: the epoch whose weights were returned.
        lr: peak learning rate of the weights.
        levels: number of levels that each quantizer used on the held-out slice, at the end.
        events: problems during training, and how training reacted to them.
        precision: the type in which the network ran.
    """

    epochs: tuple[Epoch, ...]
    chosen: int
    lr: float
    levels: dict[str, int]
    events: tuple[str, ...] = ()
    precision: str = "float32"

    @property
    def kept(self) -> Epoch:
        """The epoch whose weights were returned."""
        return next(e for e in self.epochs if e.epoch == self.chosen)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"epochs": [vars(e) for e in self.epochs], "chosen": self.chosen, "lr": self.lr,
                "levels": self.levels, "events": list(self.events), "precision": self.precision}
