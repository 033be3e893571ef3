"""Which attacks a suite is made of: a list of entries, cheap ones first."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import SpecError
from ..spec import Threat
from ._foolbox import fb
from .apgd import APGD
from .bridged import DDN, Boundary, CarliniWagner, DeepFool, HopSkipJump
from .nes import NES
from .noise import Noise
from .pgd import PGD, Climb
from .square import Square
from .substitute import Substitute
from .zoo import ZOO

MODES = ("ramp", "sigmoid(8)")
TWINS: tuple[tuple[float, float], ...] = ((2, 16), (4, 32))
# What sees no gradient of the model itself: run last, and what it breaks then speaks for itself.
BLIND = ("noise", "transfer", "black-box")
# What asks for no gradient.
_QUERIES = (Square, Noise, ZOO, NES, HopSkipJump, Boundary)
# How far differences reach over eps; None: as ZOO and NES have it, where a staircase is flat.
_REACHES = (None, 0.25, 0.5, 1.0)
# Through the twin a few long steps that shrink find more than many short ones.
_STRIDE: dict[str, Any] = {"rel_step": 0.4, "decay": True}
# Queries of Square and of HopSkipJump for each of the survivors that are nearest to the boundary:
# what they break there, a gradient that misleads has hidden.
_SEARCHES = (5000, 2500)
# Runs of the strongest attack from other seeds: they tell what the next one would break.
_RESEEDS = 5
# What is tried once the suite is through, one after the other while it pays. ``steps``: how many
# times the suite's own.
_ROUNDS: tuple[dict[str, Any], ...] = (
    {"loss": "ce", "twin": (4, 64)},
    {"loss": "margin", "twin": (4, 64), "by_image": True},
    {"loss": "margin", "twin": (4, 64), "target": 1},
    {"loss": "ce", "twin": (4, 64), "by_image": True},
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
        cost = float(values.get("steps", values.get("repeats", 1)))
        for name in ("binary_search_steps", "average", "candidates"):
            cost *= values.get(name) or 1
        if isinstance(self.attack, (ZOO, NES)):
            cost *= 2 * values.get("coordinates", values.get("samples"))
        return cost / 3 if isinstance(self.attack, _QUERIES) else cost  # no backward pass

    def settings(self) -> dict[str, Any]:
        """Return every hyper-parameter as plain JSON types."""
        plain = {k: v if isinstance(v, (int, float, str, bool, type(None))) else
                 list(v) if isinstance(v, tuple) else repr(v)
                 for k, v in vars(self.attack).items() if not k.startswith("_")}
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
        searches: the same with many queries, on the survivors that are nearest to the boundary.
        curve: from how many images accuracy over eps is drawn.
        patience: how many rounds in a row that break next to nothing end the escalation.
    """

    entries: list[Entry]
    rounds: list[Entry] = field(default_factory=list)
    reseeded: list[Entry] = field(default_factory=list)
    blind: list[Entry] = field(default_factory=list)
    searches: list[Entry] = field(default_factory=list)
    curve: int = 0
    patience: int = 2

    @property
    def every(self) -> list[Entry]:
        """Return all that may run."""
        return [*self.entries, *self.rounds, *self.reseeded, *self.blind, *self.searches]


def _rounds(steps: int, norm: str, seed: int) -> list[Entry]:
    """Return the rounds of escalation.

    On a float model, which is its own twin, they are further restarts with longer steps.
    """
    rounds = []
    for number, settings in enumerate(_ROUNDS, 1):
        options = {**_STRIDE, **settings, "steps": settings.get("steps", 1) * steps}
        attack = PGD(options.pop("loss"), norm=norm, seed=seed + number, **options)
        extra = ["by image"] * attack.by_image + \
            [f"target {attack.target}"] * bool(attack.target) + \
            [f"averaged {attack.average}"] * (attack.average > 1) + ["restart"] * attack.restart
        name = " ".join([f"twin-{attack.steps} {attack.loss}",
                         "k {:g}-{:g}".format(*settings["twin"]), *extra])
        rounds.append(Entry(f"{number}. {name}", attack, "escalation"))
    return rounds


def _default(norm: str, seed: int, steps: int, saturated: bool) -> list[Entry]:
    """Return what people run by default, which climbs the model as it is, and noise."""
    fgsm = fb.attacks.LinfFastGradientAttack() if norm == "linf" else \
        fb.attacks.L2FastGradientAttack()
    plain: dict[str, Any] = {"norm": norm, "see_through": False, "seed": seed}
    entries = [
        Entry("noise", Noise(norm, seed=seed), "noise", True),
        Entry("FGSM", fgsm, "fgsm", True),
        Entry(f"PGD-{steps}", PGD("ce", steps, **plain), "pgd", True),
        Entry(f"PGD-{steps} margin", PGD("margin", steps, **plain), "pgd")]
    if saturated:
        entries.append(Entry(f"PGD-{steps} scaled", PGD("scaled", steps, **plain), "scaled", True))
    return entries


def _climbs(norm: str, seed: int, steps: int, short: int, quantized: bool, softened: bool,
            fidelity: Mapping[str, float]) -> list[Entry]:
    """Return every surrogate gradient, those that tell most first.

    A float model has one: the rest of the budget goes to other starts.
    """
    climbs: list[tuple[float, list[Entry]]] = []
    for number, mode in enumerate(MODES, 1):
        climbs.append((fidelity.get(mode, 0.0), [
            Entry(f"PGD-{short} {loss} {mode if softened else f'start {number}'}",
                  PGD(loss, short, mode=mode, norm=norm, seed=seed + number), "modes")
            for loss in ("ce", "margin")]))
    for number, twin in enumerate(TWINS):
        own = softened and number % 2 == 1
        climbs.append((fidelity.get("twin k 8", 1.0), [
            Entry("APGD-{} {} k {:g}-{:g}".format(steps, loss, *twin) + " by image" * own,
                  APGD(loss, steps, twin=twin, by_image=own, norm=norm, seed=seed), "twin")
            for loss in ("ce", "margin")]))
    return [entry for _, pair in sorted(climbs, key=lambda climb: -climb[0]) for entry in pair]


def _autoattack(norm: str, seed: int, steps: int) -> list[Entry]:
    """Return the gradient attacks of AutoAttack's kind: as it is run, and through the twin."""
    losses: list[tuple[str, dict[str, Any]]] = [("ce", {}), *(
        ("dlr", {"target": rank}) for rank in (1, 2, 3))]
    entries = []
    for group, options in (("pgd", {"see_through": False}), ("twin", {"twin": (4, 64)})):
        for loss, more in losses:
            name = " ".join([f"APGD-{steps} {loss}", *(f"{k} {v}" for k, v in more.items()),
                             *["through the twin"] * (group == "twin")])
            entries.append(Entry(name, APGD(loss, steps, norm=norm, seed=seed, **options, **more),
                                 group))
    return entries


def _differences(norm: str, seed: int, everywhere: bool, kinds: Sequence[type]) -> list[Entry]:
    """Return ZOO, NES, with every reach: at the usual one a staircase has no differences."""
    entries = []
    for kind in kinds:
        for reach in _REACHES:
            attack = kind(norm, 20, rel_h=reach, seed=seed)
            name = kind.__name__ + (f" h {reach:g} eps" if reach else " h 1e-4")
            # at the usual reach it has a figure of its own, beside which the others stand
            entries.append(Entry(name, attack, "black-box", everywhere and reach is None))
    return entries


def _named(name: str, threat: Threat, seed: int, quantized: bool, softened: bool, saturated: bool,
           fidelity: Mapping[str, float]) -> Suite:
    norm, steps, queries, curve = threat.norm, *_SUITES[name]
    carlini = Entry("C&W L2", CarliniWagner(), "cw", True)
    entries = _default(norm, seed, steps, saturated)
    if name == "paper":
        return Suite([*entries, carlini], blind=[
            *_differences(norm, seed, True, [ZOO]),
            Entry("substitute", Substitute(norm=norm, seed=seed), "transfer", True)], curve=curve)
    # What follows the twin rarely breaks what it did not: fewer steps, that it is not left out.
    short = max(20, steps * 2 // 5)
    entries += _climbs(norm, seed, steps, short, quantized, softened, fidelity)
    # A float model is its own parent: there the budget goes to other starts.
    transfers = [Entry(f"transfer-{short} {loss} from {bits} bits" if quantized else
                       f"PGD-{short} {loss} start {number}",
                       PGD(loss, short, bits=bits if quantized else None, norm=norm,
                           seed=seed + number), "transfer" if quantized else "modes")
                 for number, loss, bits in ((3, "ce", 32), (3, "margin", 32), (4, "ce", 5))]
    square = Entry(f"Square-{queries}", Square(queries, seed=seed, norm=norm), "black-box")
    blind = [*transfers, square] if quantized else [square]
    if not quantized:
        entries += transfers
    if norm == "l2":
        entries.append(carlini)
    if name == "full":
        entries += [*_autoattack(norm, seed, steps), *[carlini] * (norm == "linf"),
                    Entry("DeepFool", DeepFool(norm), "other"),
                    *[Entry("DDN", DDN(seed=seed), "other")] * (norm == "l2")]
        blind += [Entry("substitute", Substitute(norm=norm, seed=seed), "transfer"),
                  *_differences(norm, seed, False, [NES, ZOO]),
                  Entry("HopSkipJump", HopSkipJump(norm, seed=seed), "black-box"),
                  *[Entry("Boundary", Boundary(seed=seed), "black-box")] * (norm == "l2")]
    reseeded = [Entry(f"again {number}. twin-{steps} ce k 4-64", PGD(
        "ce", steps, twin=(4, 64), norm=norm, seed=seed + 100 + number, **_STRIDE), "reseeded")
        for number in range(1, _RESEEDS + 1)]
    searches = [] if name != "standard" else [
        Entry(f"Square-{_SEARCHES[0]}, the nearest",
              Square(_SEARCHES[0], seed=seed + 1, norm=norm), "black-box"),
        Entry(f"HopSkipJump-{_SEARCHES[1]}, the nearest",
              HopSkipJump(norm, _SEARCHES[1], seed=seed), "black-box")]
    # Behind thresholds one kind of windows often breaks what the other does not: two of each.
    return Suite(entries, _rounds(steps, norm, seed), reseeded, blind, searches, curve,
                 patience=4 if softened else 2)


def _group(attack: Any) -> str:
    """Return what an attack of a list stands for, see :class:`Entry`."""
    if isinstance(attack, Climb):
        moved = getattr(attack, "bits", None) is not None
        return "transfer" if moved else "twin" if attack.twin else "pgd"
    if isinstance(attack, Noise):
        return "noise"
    if isinstance(attack, (*_QUERIES, Substitute)):
        return "transfer" if isinstance(attack, Substitute) else "black-box"
    if isinstance(attack, fb.attacks.L2CarliniWagnerAttack):
        return "cw"
    if isinstance(attack, fb.attacks.gradient_descent_base.BaseGradientDescent):
        return "pgd" if attack.steps > 1 else "fgsm"
    return "other"


# What each suite spends: gradient steps, queries of Square, images that the curve is drawn from.
_SUITES: dict[str, tuple[int, int, int]] = {
    "quick": (20, 200, 128),
    "standard": (50, 1000, 256),
    "paper": (50, 0, 256),
    "full": (100, 5000, 256),
}


# What people call a suite by how long it takes.
_MEANT = {**dict.fromkeys(("fast", "small", "short", "light", "tiny"), "quick"),
          **dict.fromkeys(("normal", "default", "medium", "std"), "standard"),
          **dict.fromkeys(("slow", "large", "big", "long", "all", "complete", "strong"), "full")}


def build_suite(suite: str | Sequence[Any], threat: Threat, *, seed: int, quantized: bool,
                foreign: bool = False, saturated: bool = False,
                fidelity: Mapping[str, float] | None = None) -> Suite:
    """Return a named suite, or one of a list of Foolbox attacks or entries.

    Args:
        quantized: whether the model has staircases.
        foreign: whether it has other people's, which are softened, too.
        saturated: whether its logits are so far apart that cross-entropy rounds to nothing.
        fidelity: of each surrogate, see :attr:`quantguard.Evaluation.fidelity`: those that tell
            most climb first, and leave the others less to do.

    Raises:
        SpecError: an unknown name, an empty list, or something that is no attack.
    """
    check_suite(suite)
    if isinstance(suite, str):
        return _named(suite, threat, seed, quantized, quantized or foreign, saturated,
                      fidelity or {})
    return Suite([attack if isinstance(attack, Entry) else
                  Entry(f"{type(attack).__name__} {number + 1}", attack, _group(attack), True)
                  for number, attack in enumerate(suite)])


def listed(suite: Any) -> Any:
    """Return a suite's name, or a list of attacks: one attack alone is a suite of one.

    What is neither is handed on for :func:`check_suite` to refuse.
    """
    if isinstance(suite, (str, Entry, fb.attacks.base.Attack)):
        return suite if isinstance(suite, str) else [suite]
    return list(suite) if isinstance(suite, Iterable) else [suite]


def check_suite(suite: str | Sequence[Any]) -> None:
    """Refuse what is no suite.

    Raises:
        SpecError: an unknown name, an empty list, or something that is no attack.
    """
    if isinstance(suite, str):
        if suite not in _SUITES:
            near = [_MEANT[suite.lower()]] if suite.lower() in _MEANT else \
                difflib.get_close_matches(suite, _SUITES, 1)
            raise SpecError(f"suite {suite!r} is unknown",
                            fix=f"Use one of {', '.join(_SUITES)}" +
                            (f"; did you mean {near[0]!r}?" if near else "."))
        return
    for number, attack in enumerate(suite):
        if not isinstance(attack, (Entry, fb.attacks.base.Attack)):
            raise SpecError(f"attack {number + 1} of the suite is a {type(attack).__name__}",
                            fix="Give foolbox.attacks.Attack objects or a suite's name.")
    if not len(suite):
        raise SpecError("the suite holds no attack")
