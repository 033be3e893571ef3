"""Entries of a suite, and the suite that they make up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .decision_based import Boundary, HopSkipJump
from .nes import NES
from .noise import Noise
from .square import Square
from .zoo import ZOO

# Attacks that compute no gradient.
QUERY_ATTACKS = (Square, Noise, ZOO, NES, HopSkipJump, Boundary)


@dataclass(frozen=True)
class Entry:
    """One attack of a suite.

    Attributes:
        label: its name in tables and JSON.
        attack: any ``foolbox.attacks.Attack``.
        group: its kind: ``noise``, ``fgsm``, ``pgd`` (the attacks that people run by default),
            ``modes``, ``softened``, ``escalation``, ``reseeded``, ``scaled``, ``cw``,
            ``transfer``, ``black-box`` or ``other``.
        everywhere: whether it runs on every correctly classified image, so that its own figure can
            be reported; otherwise it runs on the survivors only.
    """

    label: str
    attack: Any
    group: str
    everywhere: bool = False

    @property
    def cost(self) -> float:
        """Return the approximate number of gradients an image, for the ETA."""
        values = vars(self.attack)
        cost = float(values.get("steps", values.get("repeats", 1)))
        for name in ("binary_search_steps", "average", "candidates"):
            cost *= values.get(name) or 1
        if isinstance(self.attack, (ZOO, NES)):
            cost *= 2 * values.get("coordinates", values.get("samples"))
        return cost / 3 if isinstance(self.attack, QUERY_ATTACKS) else cost  # no backward pass

    def settings(self) -> dict[str, Any]:
        """Return every hyper-parameter as plain JSON types."""
        plain = {k: v if isinstance(v, (int, float, str, bool, type(None))) else
                 list(v) if isinstance(v, tuple) else repr(v)
                 for k, v in vars(self.attack).items() if not k.startswith("_")}
        return {"label": self.label, "class": type(self.attack).__name__, "group": self.group,
                "everywhere": self.everywhere, **plain}


@dataclass(frozen=True)
class Suite:
    """Attacks to run, in this order.

    Attributes:
        entries: always run.
        rounds: escalation, run while it breaks enough images.
        reseeded: the strongest attack with other seeds, on some of the survivors.
        gradient_free: attacks that see no gradient of the model.
        searches: gradient-free attacks with many queries, on the survivors nearest to the
            boundary.
        curve: number of images from which accuracy over eps is computed.
        patience: number of rounds in a row breaking next to nothing after which escalation ends.
    """

    entries: list[Entry]
    rounds: list[Entry] = field(default_factory=list)
    reseeded: list[Entry] = field(default_factory=list)
    gradient_free: list[Entry] = field(default_factory=list)
    searches: list[Entry] = field(default_factory=list)
    curve: int = 0
    patience: int = 2

    @property
    def every(self) -> list[Entry]:
        """Return all entries that may run."""
        return [*self.entries, *self.rounds, *self.reseeded, *self.gradient_free, *self.searches]
