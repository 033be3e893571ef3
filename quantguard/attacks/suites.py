"""Named suites of attacks, and suites made of a list of attacks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..core.errors import SpecError
from ..core.specs import Threat
from .apgd import APGD
from .base import fb
from .decision_based import Boundary, HopSkipJump
from .escalation import LONG_STEPS, escalation_rounds
from .gradient_attack import GradientAttack
from .minimum_norm import DDN, CarliniWagner, DeepFool
from .nes import NES
from .noise import Noise
from .pgd import PGD
from .square import Square
from .substitute import Substitute
from .suite_entry import QUERY_ATTACKS, Entry, Suite
from .zoo import ZOO

# What each suite spends: gradient steps, queries of Square, images for accuracy over eps.
_SUITES: dict[str, tuple[int, int, int]] = {
    "quick": (20, 200, 128),
    "standard": (50, 1000, 256),
    "paper": (50, 0, 256),
    "full": (100, 5000, 256),
}
# Other words for a suite, suggested in error messages.
_SYNONYMS = {**dict.fromkeys(("fast", "small", "short", "light", "tiny"), "quick"),
             **dict.fromkeys(("normal", "default", "medium", "std"), "standard"),
             **dict.fromkeys(("slow", "large", "big", "long", "all", "complete", "strong"), "full")}
# Backward modes of PGD, and sharpnesses of APGD, in every suite but "paper".
MODES = ("ramp", "sigmoid(8)")
SHARPNESSES: tuple[tuple[float, float], ...] = ((2, 16), (4, 32))
# Groups that see no gradient of the model itself. They run last: what they still break is evidence
# that gradients are masked.
GRADIENT_FREE = ("noise", "transfer", "black-box")
# rel_h of finite differences; None: the defaults of ZOO and NES, over which a quantizer is flat.
_REL_H = (None, 0.25, 0.5, 1.0)
# Queries of Square and of HopSkipJump for each of the survivors nearest to the boundary: images
# that they break had been protected by misleading gradients.
_SEARCHES = (5000, 2500)
# Runs of the strongest attack with other seeds, which estimate what the next one would break.
_RESEEDS = 5


def _default(norm: str, seed: int, steps: int, saturated: bool) -> list[Entry]:
    """Return noise and the attacks that people run by default, without BPDA."""
    fgsm = fb.attacks.LinfFastGradientAttack() if norm == "linf" else \
        fb.attacks.L2FastGradientAttack()
    plain: dict[str, Any] = {"norm": norm, "bpda": False, "seed": seed}
    entries = [
        Entry("noise", Noise(norm, seed=seed), "noise", True),
        Entry("FGSM", fgsm, "fgsm", True),
        Entry(f"PGD-{steps}", PGD("ce", steps, **plain), "pgd", True),
        Entry(f"PGD-{steps} margin", PGD("margin", steps, **plain), "pgd")]
    if saturated:
        entries.append(Entry(f"PGD-{steps} scaled", PGD("scaled", steps, **plain), "scaled", True))
    return entries


def _gradient_attacks(norm: str, seed: int, steps: int, short: int, softened: bool,
                      fidelity: Mapping[str, float]) -> list[Entry]:
    """Return attacks by every surrogate gradient, those of the highest fidelity first.

    A float model has one gradient only: there the attacks differ by their start.
    """
    pairs: list[tuple[float, list[Entry]]] = []
    for number, mode in enumerate(MODES, 1):
        pairs.append((fidelity.get(mode, 0.0), [
            Entry(f"PGD-{short} {loss} {mode if softened else f'start {number}'}",
                  PGD(loss, short, mode=mode, norm=norm, seed=seed + number), "modes")
            for loss in ("ce", "margin")]))
    for number, sharpness in enumerate(SHARPNESSES):
        by_image = softened and number % 2 == 1
        suffix = " by image" if by_image else ""
        pairs.append((fidelity.get("softened k 8", 1.0), [
            Entry("APGD-{} {} k {:g}-{:g}".format(steps, loss, *sharpness) + suffix,
                  APGD(loss, steps, sharpness=sharpness, by_image=by_image, norm=norm, seed=seed),
                  "softened")
            for loss in ("ce", "margin")]))
    return [entry for _, pair in sorted(pairs, key=lambda item: -item[0]) for entry in pair]


def _autoattack(norm: str, seed: int, steps: int) -> list[Entry]:
    """Return AutoAttack's gradient attacks: on the model itself, and on the softened model."""
    losses: list[tuple[str, dict[str, Any]]] = [("ce", {}), *(
        ("dlr", {"target": rank}) for rank in (1, 2, 3))]
    entries = []
    for group, options, suffix in (
            ("pgd", {"bpda": False}, ""),
            ("softened", {"sharpness": (4, 64)}, " through the softened model")):
        for loss, more in losses:
            name = " ".join([f"APGD-{steps} {loss}", *(f"{k} {v}" for k, v in more.items())])
            attack = APGD(loss, steps, norm=norm, seed=seed, **options, **more)
            entries.append(Entry(name + suffix, attack, group))
    return entries


def _finite_differences(norm: str, seed: int, everywhere: bool,
                        kinds: Sequence[type]) -> list[Entry]:
    """Return ZOO or NES with every h; at the usual h a quantized model has no differences."""
    entries = []
    for kind in kinds:
        for rel_h in _REL_H:
            attack = kind(norm, 20, rel_h=rel_h, seed=seed)
            name = kind.__name__ + (f" h {rel_h:g} eps" if rel_h else " h 1e-4")
            # The usual h gets a figure of its own, to compare the others with.
            entries.append(Entry(name, attack, "black-box", everywhere and rel_h is None))
    return entries


def _named(name: str, threat: Threat, seed: int, quantized: bool, softened: bool, saturated: bool,
           fidelity: Mapping[str, float]) -> Suite:
    norm, steps, queries, curve = threat.norm, *_SUITES[name]
    carlini = Entry("C&W L2", CarliniWagner(), "cw", True)
    entries = _default(norm, seed, steps, saturated)
    if name == "paper":
        return Suite([*entries, carlini], gradient_free=[
            *_finite_differences(norm, seed, True, [ZOO]),
            Entry("substitute", Substitute(norm=norm, seed=seed), "transfer", True)], curve=curve)
    # After the softened model these rarely break more, but must not be missing: fewer steps.
    short = max(20, steps * 2 // 5)
    entries += _gradient_attacks(norm, seed, steps, short, softened, fidelity)
    # A float model has no float parent to transfer from: it gets other starts instead.
    transfers = [Entry(f"transfer-{short} {loss} from {bits} bits" if quantized else
                       f"PGD-{short} {loss} start {number}",
                       PGD(loss, short, bits=bits if quantized else None, norm=norm,
                           seed=seed + number), "transfer" if quantized else "modes")
                 for number, loss, bits in ((3, "ce", 32), (3, "margin", 32), (4, "ce", 5))]
    square = Entry(f"Square-{queries}", Square(queries, seed=seed, norm=norm), "black-box")
    gradient_free = [*transfers, square] if quantized else [square]
    if not quantized:
        entries += transfers
    if norm == "l2":
        entries.append(carlini)
    if name == "full":
        entries += _autoattack(norm, seed, steps)
        if norm == "linf":
            entries.append(carlini)
        entries.append(Entry("DeepFool", DeepFool(norm), "other"))
        if norm == "l2":
            entries.append(Entry("DDN", DDN(seed=seed), "other"))
        gradient_free += [Entry("substitute", Substitute(norm=norm, seed=seed), "transfer"),
                          *_finite_differences(norm, seed, False, [NES, ZOO]),
                          Entry("HopSkipJump", HopSkipJump(norm, seed=seed), "black-box")]
        if norm == "l2":
            gradient_free.append(Entry("Boundary", Boundary(seed=seed), "black-box"))
    reseeded = [Entry(f"again {number}. softened-{steps} ce k 4-64", PGD(
        "ce", steps, sharpness=(4, 64), norm=norm, seed=seed + 100 + number, **LONG_STEPS),
        "reseeded") for number in range(1, _RESEEDS + 1)]
    searches = [] if name != "standard" else [
        Entry(f"Square-{_SEARCHES[0]}, the nearest",
              Square(_SEARCHES[0], seed=seed + 1, norm=norm), "black-box"),
        Entry(f"HopSkipJump-{_SEARCHES[1]}, the nearest",
              HopSkipJump(norm, _SEARCHES[1], seed=seed), "black-box")]
    # Behind thresholds one kind of windows often breaks what the other does not: two of each.
    return Suite(entries, escalation_rounds(steps, norm, seed), reseeded, gradient_free, searches,
                 curve, patience=4 if softened else 2)


def _group(attack: Any) -> str:
    """Return the group of an attack in a list, see :class:`Entry`."""
    if isinstance(attack, GradientAttack):
        if getattr(attack, "bits", None) is not None:
            return "transfer"
        return "softened" if attack.sharpness else "pgd"
    if isinstance(attack, Noise):
        return "noise"
    if isinstance(attack, Substitute):
        return "transfer"
    if isinstance(attack, QUERY_ATTACKS):
        return "black-box"
    if isinstance(attack, fb.attacks.L2CarliniWagnerAttack):
        return "cw"
    if isinstance(attack, fb.attacks.gradient_descent_base.BaseGradientDescent):
        return "pgd" if attack.steps > 1 else "fgsm"
    return "other"


def build_suite(suite: str | Sequence[Any], threat: Threat, *, seed: int, quantized: bool,
                softenable: bool = False, saturated: bool = False,
                fidelity: Mapping[str, float] | None = None) -> Suite:
    """Return a named suite, or one made of a list of Foolbox attacks or entries.

    Args:
        suite: its name, or the list.
        threat: norm of the attacks.
        seed: of the attacks.
        quantized: whether the model has quantizers of ours.
        softenable: whether it has other people's quantizers, which are softened, too.
        saturated: whether its logits are so far apart that the gradient of cross-entropy is 0.
        fidelity: of each surrogate, see :attr:`quantguard.Evaluation.fidelity`: those of the
            highest fidelity come first, and leave fewer survivors to the others.

    Raises:
        SpecError: an unknown name, an empty list, or an item that is no attack.
    """
    check_suite(suite)
    if isinstance(suite, str):
        return _named(suite, threat, seed, quantized, quantized or softenable, saturated,
                      fidelity or {})
    return Suite([attack if isinstance(attack, Entry) else
                  Entry(f"{type(attack).__name__} {number + 1}", attack, _group(attack), True)
                  for number, attack in enumerate(suite)])


def listed(suite: Any) -> Any:
    """Return a suite's name, or its list of attacks; a single attack becomes a list of one.

    Anything else is put into a list for :func:`check_suite` to refuse.
    """
    if isinstance(suite, (str, Entry, fb.attacks.base.Attack)):
        return suite if isinstance(suite, str) else [suite]
    return list(suite) if isinstance(suite, Iterable) else [suite]


def check_suite(suite: str | Sequence[Any]) -> None:
    """Check that a suite is a known name or a list of attacks.

    Raises:
        SpecError: an unknown name, an empty list, or an item that is no attack.
    """
    if isinstance(suite, str):
        if suite not in _SUITES:
            near = [_SYNONYMS[suite.lower()]] if suite.lower() in _SYNONYMS else \
                difflib.get_close_matches(suite, _SUITES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise SpecError(f"suite {suite!r} is unknown",
                            fix=f"Use one of {', '.join(_SUITES)}{hint}")
        return
    for number, attack in enumerate(suite):
        if not isinstance(attack, (Entry, fb.attacks.base.Attack)):
            raise SpecError(f"attack {number + 1} of the suite is a {type(attack).__name__}",
                            fix="Pass foolbox.attacks.Attack objects or a suite's name.")
    if not len(suite):
        raise SpecError("the suite contains no attack")
