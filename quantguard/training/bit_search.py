"""Search for the lowest bits whose clean accuracy is close enough to the float model's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from ..conversion.converter import conversion_of
from ..core.errors import SpecError
from ..core.specs import FLOAT_BITS
from ..data.holdout import has_labels
from ..nn.input_quantizer import is_input
from ..nn.quant_activation import quantizers
from .stage_trainer import Hardened, Stage, StageTrainer, bits_name
from .validation import costs

# The bits that are tried, in this order.
_LADDER = (8, 4, 3, 2)


def lowest_bits(trainer: StageTrainer, lowest: int, epochs: int, drop: float) -> Hardened:
    """Train with fewer and fewer bits, and return the last model that is accurate enough.

    Every stage starts from the same weights and has the same epochs, so that only the bits differ.

    Args:
        lowest: the lowest bits to try.
        epochs: of each stage.
        drop: the largest accepted drop of the held-out clean accuracy, 0 to 1.

    Raises:
        SpecError: a converted model, impossible bits, or no held-out images with labels.
    """
    _check(trainer, lowest, drop)
    start = trainer.model
    if trainer.recipe.init == "keep":
        start = _try(trainer, "float", start, FLOAT_BITS, epochs, None)[0]
    accepted, clean = _try(trainer, "float control", start, FLOAT_BITS, epochs, None)
    least = clean - drop
    for bits in [b for b in _LADDER if b > lowest] + [lowest]:
        model, clean = _try(trainer, bits_name(bits), start, bits, epochs, least)
        if not trainer.stages[-1].holds:
            found = _one_site_more(trainer, accepted, model, bits, least - clean)
            if found is not None:
                table, site = found
                name = f"{bits} bits, {site} {table[site]}"
                model, _ = _try(trainer, name, start, table, epochs, least)
                accepted = model if trainer.stages[-1].holds else accepted
            break
        accepted = model
    if not any(not is_input(name) for name in quantizers(accepted)):
        trainer.say("no bits are accurate enough: the float model is returned")
    trainer.save_stages()
    return Hardened(accepted, tuple(trainer.stages))


def _check(trainer: StageTrainer, lowest: int, drop: float) -> None:
    if quantizers(trainer.model):
        raise SpecError("max_clean_drop starts from a float model, and this one is converted",
                        fix="quantguard.restore(model) gives the float one.")
    if not isinstance(drop, (int, float)) or not 0 <= drop <= 1:
        raise SpecError(f"max_clean_drop={drop!r} must be from 0 to 1")
    if not isinstance(lowest, int) or not 1 <= lowest <= 8:
        raise SpecError(f"max_clean_drop tries 8 bits and fewer, and bits={lowest!r} is not one of "
                        "them", fix="Use bits=1 to 8.")
    if trainer.train != "all":
        raise SpecError(f"max_clean_drop starts with float, and train={trainer.train!r} leaves "
                        "nothing to train there", fix="Use train='all'.")
    if trainer.recipe.bit_schedule:
        raise SpecError("max_clean_drop has a bit schedule of its own",
                        fix="Leave bit_schedule= out.")
    holdout = trainer.source().val
    if holdout is None or not has_labels(holdout):
        raise SpecError("max_clean_drop needs held-out images with labels",
                        fix="Give a map-style DataLoader of some images, or val=.")


def _try(trainer: StageTrainer, name: str, start: nn.Module, bits: int | Mapping[str, int],
         epochs: int, least: float | None) -> tuple[nn.Module, float]:
    """Train a stage and log whether it is accurate enough; return the model and its accuracy.

    Args:
        least: the clean accuracy that is needed; None: this stage is the reference.
    """
    folder = re.sub(r"[^0-9A-Za-z.]+", "-", name)
    model, history = trainer.train_stage(start, bits, epochs, folder)
    clean = history.kept.clean
    if clean is None:
        raise SpecError("max_clean_drop needs held-out images with labels", fix="Give val=.")
    holds = least is None or clean >= least - 1e-9  # 0.7 - 0.01 is above 0.69
    lowest = min(bits.values()) if isinstance(bits, Mapping) else bits
    trainer.stages.append(Stage(name, lowest, epochs, history, holds))
    recipe, text = trainer.recipe, f"{name}: held-out clean {clean:.1%}"
    if history.kept.validation is not None and (recipe.attacks or recipe.certifies):
        kind = "certified" if recipe.certifies else "attacked"
        text += f", {kind} {history.kept.validation:.1%}"
    if least is not None:
        text += f": {'accepted' if holds else 'too low'} (at least {least:.1%})"
    trainer.say(text)
    return model, clean


def _one_site_more(trainer: StageTrainer, accepted: nn.Module, failed: nn.Module, bits: int,
                   lacking: float) -> tuple[dict[str, int], str] | None:
    """Return bits by site with one site at its earlier bits, and that site.

    Return None if no single site accounts for half of the missing accuracy.

    Args:
        accepted: the last model that was accurate enough.
        failed: the model with ``bits``, which was not.
        lacking: the clean accuracy that it lacks.
    """
    before = {name: m.spec.bits for name, m in quantizers(accepted).items() if not is_input(name)}
    found = costs(failed, trainer.source().some or (), trainer.threat, trainer.seed,
                  trainer.recipe.distill > 0)
    enough = [name for name, (clean, _) in found.items()
              if not is_input(name) and 2 * clean >= lacking]
    if len(before) < 2 or not enough:
        trainer.say("no single site accounts for the lost accuracy")
        return None
    site = max(enough, key=lambda name: found[name][1])  # by attacked accuracy
    # A site's name may also match other sites as a pattern, and the last match counts: names that
    # are kinds come first.
    done = conversion_of(failed)
    early = {"first", "last", *(s.kind for s in (done.plan.sites if done else ()))}
    names = sorted(before, key=lambda name: (name not in early, len(name)))
    return {name: before[site] if name == site else bits for name in names}, site
