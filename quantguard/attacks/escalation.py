"""Rounds of escalation: ever stronger PGD through the softened model."""

from __future__ import annotations

from typing import Any

from .pgd import PGD
from .suite_entry import Entry

# Through the softened model a few long, shrinking steps find more than many short ones.
LONG_STEPS: dict[str, Any] = {"rel_step": 0.4, "decay": True}
# Rounds after the suite's entries, run one after the other while they break enough images.
# ``steps`` is a multiple of the suite's own number.
_ROUNDS: tuple[dict[str, Any], ...] = (
    {"loss": "ce", "sharpness": (4, 64)},
    {"loss": "margin", "sharpness": (4, 64), "by_image": True},
    {"loss": "margin", "sharpness": (4, 64), "target": 1},
    {"loss": "ce", "sharpness": (4, 64), "by_image": True},
    {"loss": "ce", "sharpness": (1, 64), "steps": 2},
    {"loss": "margin", "sharpness": (4, 64), "target": 2},
    {"loss": "ce", "sharpness": (8, 128), "restart": True, "noise": 0.5},
    {"loss": "margin", "sharpness": (4, 64), "target": 3},
    {"loss": "ce", "sharpness": (4, 64), "average": 4},
    {"loss": "scaled", "sharpness": (4, 128), "restart": True, "noise": 0.25, "steps": 2},
    {"loss": "margin", "sharpness": (2, 256), "steps": 4},
    {"loss": "ce", "sharpness": (4, 64), "steps": 4},
)


def escalation_rounds(steps: int, norm: str, seed: int) -> list[Entry]:
    """Return the rounds of escalation.

    On a float model, which equals its softened model, they are restarts with longer steps.
    """
    rounds = []
    for number, settings in enumerate(_ROUNDS, 1):
        options = {**LONG_STEPS, **settings, "steps": settings.get("steps", 1) * steps}
        attack = PGD(options.pop("loss"), norm=norm, seed=seed + number, **options)
        words = [f"softened-{attack.steps} {attack.loss}",
                 "k {:g}-{:g}".format(*settings["sharpness"])]
        if attack.by_image:
            words.append("by image")
        if attack.target:
            words.append(f"target {attack.target}")
        if attack.average > 1:
            words.append(f"averaged {attack.average}")
        if attack.restart:
            words.append("restart")
        rounds.append(Entry(f"{number}. {' '.join(words)}", attack, "escalation"))
    return rounds
