"""Which attacks a suite is made of: a list of entries, cheap ones first."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import SpecError
from ..spec import Threat
from ._foolbox import fb
from .noise import Noise
from .pgd import PGD
from .square import Square

MODES = ("ramp", "sigmoid(8)")
TWINS: tuple[tuple[float, float], ...] = ((2, 16), (4, 32))
# What sees no gradient of the model itself: run last, and what it breaks then speaks for itself.
BLIND = ("noise", "transfer", "black-box")
# Through the twin a few long steps that shrink find more than many short ones.
_STRIDE: dict[str, Any] = {"rel_step": 0.4, "decay": True}
# Runs of the strongest attack from other seeds: they tell what the next one would break.
_RESEEDS = 5
# What is tried once the suite is through, one after the other while it pays. ``steps``: how many
# times the suite's own.
_ROUNDS: tuple[dict[str, Any], ...] = (
    {"loss": "ce", "twin": (4, 64)},
    {"loss": "margin", "twin": (4, 64), "target": 1},
    {"loss": "ce", "twin": (1, 64), "steps": 2},
    {"loss": "margin", "twin": (4, 64), "target": 2},
    {"loss": "ce", "twin": (8, 128), "restart": True, "noise": 0.5},
    {"loss": "margin", "twin": (4, 64), "target": 3},
    {"loss": "ce", "twin": (4, 64), "average": 4},
    {"loss": "scaled", "twin": (4, 128), "restart": True, "noise": 0.25, "steps": 2},
    {"loss": "margin", "twin": (2, 256), "steps": 4},
    {"loss": "ce", "twin": (4, 64), "steps": 4},
)


@dataclass(frozen=True)
class Entry:
    """Hold one attack of a suite.

    Attributes:
        label: its name in tables and JSON.
        attack: any ``foolbox.attacks.Attack``.
        group: what it stands for: ``noise``, ``fgsm``, ``pgd`` (what people run by default),
            ``modes``, ``twin``, ``escalation``, ``reseeded``, ``scaled``, ``cw``, ``transfer``,
            ``black-box`` or ``other``.
        everywhere: whether it is run on every correctly classified image, so that its own figure
            can be shown; otherwise only on images that still stand.
    """

    label: str
    attack: Any
    group: str
    everywhere: bool = False

    @property
    def cost(self) -> float:
        """Return roughly how many gradients an image costs, for the ETA."""
        values = vars(self.attack)
        if "binary_search_steps" in values:
            return float(values["binary_search_steps"] * values["steps"])
        steps = float(values.get("steps", values.get("repeats", 1)) * values.get("average", 1))
        return steps / 3 if isinstance(self.attack, (Square, Noise)) else steps  # no backward pass

    def settings(self) -> dict[str, Any]:
        """Return every hyper-parameter as plain JSON types."""
        plain = {k.strip("_"): v if isinstance(v, (int, float, str, bool, type(None))) else
                 list(v) if isinstance(v, tuple) else repr(v)
                 for k, v in vars(self.attack).items()}
        return {"label": self.label, "class": type(self.attack).__name__, "group": self.group,
                "everywhere": self.everywhere, **plain}


@dataclass(frozen=True)
class Suite:
    """Hold what is run, in this order.

    Attributes:
        entries: run always.
        rounds: escalation, run while it pays.
        reseeded: the strongest attack from other seeds, on some of what stands.
        blind: what sees no gradient of the model.
        curve: from how many images accuracy over eps is drawn.
    """

    entries: list[Entry]
    rounds: list[Entry] = field(default_factory=list)
    reseeded: list[Entry] = field(default_factory=list)
    blind: list[Entry] = field(default_factory=list)
    curve: int = 0

    @property
    def every(self) -> list[Entry]:
        """Return all that may run."""
        return [*self.entries, *self.rounds, *self.reseeded, *self.blind]


def _rounds(steps: int, norm: str, seed: int) -> list[Entry]:
    """Return the rounds of escalation.

    On a float model, which is its own twin, they are further restarts with longer steps.
    """
    rounds = []
    for number, settings in enumerate(_ROUNDS, 1):
        options = {**_STRIDE, **settings, "steps": settings.get("steps", 1) * steps}
        attack = PGD(options.pop("loss"), norm=norm, seed=seed + number, **options)
        extra = [f"target {attack.target}"] * bool(attack.target) + \
            [f"averaged {attack.average}"] * (attack.average > 1) + ["restart"] * attack.restart
        name = " ".join([f"twin-{attack.steps} {attack.loss}",
                         "k {:g}-{:g}".format(*settings["twin"]), *extra])
        rounds.append(Entry(f"{number}. {name}", attack, "escalation"))
    return rounds


def _entries(threat: Threat, seed: int, quantized: bool, *, steps: int, queries: int, curve: int,
             saturated: bool, fidelity: Mapping[str, float]) -> Suite:
    norm = threat.norm
    fgsm = fb.attacks.LinfFastGradientAttack() if norm == "linf" else \
        fb.attacks.L2FastGradientAttack()
    entries = [
        Entry("noise", Noise(norm, seed=seed), "noise", True),
        Entry("FGSM", fgsm, "fgsm", True),
        # what people run by default climbs the model as it is
        Entry(f"PGD-{steps}", PGD("ce", steps, norm=norm, see_through=False, seed=seed), "pgd",
              True),
        Entry(f"PGD-{steps} margin",
              PGD("margin", steps, norm=norm, see_through=False, seed=seed), "pgd"),
    ]
    if saturated:
        entries.append(Entry(f"PGD-{steps} scaled", PGD(
            "scaled", steps, norm=norm, see_through=False, seed=seed), "scaled", True))
    # What follows rarely breaks what the twin did not: fewer steps, that it is not left out.
    short = max(20, steps * 2 // 5)
    climbs: list[tuple[float, list[Entry]]] = []
    for number, mode in enumerate(MODES, 1):  # on a float model these are restarts
        climbs.append((fidelity.get(mode, 0.0), [
            Entry(f"PGD-{short} {loss} {mode}",
                  PGD(loss, short, mode=mode, norm=norm, seed=seed + number), "modes")
            for loss in ("ce", "margin")]))
    for twin in TWINS:
        climbs.append((fidelity.get("twin k 8", 1.0), [
            Entry("twin-{} {} k {:g}-{:g}".format(steps, loss, *twin),
                  PGD(loss, steps, twin=twin, norm=norm, seed=seed, **_STRIDE), "twin")
            for loss in ("ce", "margin")]))
    for _, pair in sorted(climbs, key=lambda climb: -climb[0]):
        entries += pair
    reseeded = [Entry(f"again {number}. twin-{steps} ce k 4-64", PGD(
        "ce", steps, twin=(4, 64), norm=norm, seed=seed + 100 + number, **_STRIDE), "reseeded")
        for number in range(1, _RESEEDS + 1)]
    # A float model is its own parent: there the budget goes to another start.
    transfers = [Entry(f"transfer-{short} {loss} from {bits} bits",
                       PGD(loss, short, bits=bits if quantized else None, norm=norm, seed=seed + 1),
                       "transfer" if quantized else "modes")
                 for loss, bits in (("ce", 32), ("margin", 32), ("ce", 5))]
    blind = transfers if quantized else []
    if norm == "linf":
        blind = [*blind, Entry(f"Square-{queries}", Square(queries, seed=seed), "black-box")]
    return Suite(entries if quantized else [*entries, *transfers],
                 _rounds(steps, norm, seed), reseeded, blind, curve)


def _group(attack: Any) -> str:
    """Return what an attack of a list stands for, see :class:`Entry`."""
    if isinstance(attack, PGD):
        return "transfer" if attack.bits else "twin" if attack.twin else "pgd"
    if isinstance(attack, (Noise, Square)):
        return "noise" if isinstance(attack, Noise) else "black-box"
    if isinstance(attack, fb.attacks.L2CarliniWagnerAttack):
        return "cw"
    if isinstance(attack, fb.attacks.gradient_descent_base.BaseGradientDescent):
        return "pgd" if attack.steps > 1 else "fgsm"
    return "other"


# A literal table: what each suite spends.
_SUITES: dict[str, dict[str, Any]] = {
    "quick": {"steps": 20, "queries": 200, "curve": 128},
    "standard": {"steps": 50, "queries": 1000, "curve": 256},
}


def build_suite(suite: str | Sequence[Any], threat: Threat, *, seed: int, quantized: bool,
                saturated: bool = False, fidelity: Mapping[str, float] | None = None) -> Suite:
    """Return a named suite, or one of a list of Foolbox attacks or entries.

    Args:
        quantized: whether the model has staircases.
        saturated: whether its logits are so far apart that cross-entropy rounds to nothing.
        fidelity: of each surrogate, see :attr:`quantguard.Evaluation.fidelity`: those that tell
            most climb first, and leave the others less to do.

    Raises:
        SpecError: an unknown name, an empty list, or something that is no attack.
    """
    if isinstance(suite, str):
        if suite not in _SUITES:
            near = difflib.get_close_matches(suite, _SUITES, 1, 0.3)
            raise SpecError(f"suite {suite!r} is unknown",
                            fix=f"Use one of {', '.join(_SUITES)}" +
                            (f"; did you mean {near[0]!r}?" if near else "."))
        return _entries(threat, seed, quantized, saturated=saturated, fidelity=fidelity or {},
                        **_SUITES[suite])
    entries = []
    for number, attack in enumerate(suite):
        if isinstance(attack, Entry):
            entries.append(attack)
        elif isinstance(attack, fb.attacks.base.Attack):
            entries.append(Entry(f"{type(attack).__name__} {number + 1}", attack,
                                 _group(attack), True))
        else:
            raise SpecError(f"attack {number + 1} of the suite is a {type(attack).__name__}",
                            fix="Give foolbox.attacks.Attack objects or a suite's name.")
    if not entries:
        raise SpecError("the suite holds no attack")
    return Suite(entries)
