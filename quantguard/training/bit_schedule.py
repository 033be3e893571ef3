"""Hardening in stages of decreasing bits, as a recipe's bit schedule says."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.specs import FLOAT_BITS
from ..nn.input_quantizer import is_input
from ..nn.quant_activation import quantizers
from .recipes import Recipe
from .stage_trainer import Hardened, Stage, StageTrainer, bits_name


def stages(recipe: Recipe, bits: int, epochs: int) -> list[tuple[int, int]]:
    """Return (bits, epochs) of every stage; the last stage has at least half of the epochs.

    If there are too few epochs, the first bits of the schedule are left out.
    """
    before = [b for b in recipe.bit_schedule or () if b > bits]
    before = before[max(0, len(before) - epochs // 2):] if epochs > 1 else []
    each = max(1, epochs // (2 * len(before))) if before else 0
    return [*((b, each) for b in before), (bits, epochs - each * len(before))]


def train_stages(trainer: StageTrainer, bits: int | Mapping[str, int] | None,
                 epochs: int) -> Hardened:
    """Train the stages of the recipe's bit schedule, each from the weights of the one before.

    Args:
        bits: of the last stage; None: those of the converted model, else 2.
        epochs: of all stages together.
    """
    model, recipe = trainer.model, trainer.recipe
    present = [m.spec.bits for name, m in quantizers(model).items() if not is_input(name)]
    if isinstance(bits, Mapping):
        wanted = min(bits.values(), default=2)
    else:
        wanted = min(present, default=2) if bits is None else bits
    plan = [(wanted, epochs)]
    if not quantizers(model) and trainer.train == "all":
        plan = stages(recipe, wanted, epochs)
    if recipe.bit_schedule and len(plan) == 1 and wanted != FLOAT_BITS:
        trainer.say("bit_schedule= is left out: it needs a float model, train='all', bits above "
                    "the last ones, and two epochs at least")
    for number, (stage_bits, stage_epochs) in enumerate(plan, 1):
        last = (stage_bits, stage_epochs) == plan[-1]
        name = bits_name(stage_bits)
        folder = None if len(plan) == 1 else f"{number}-{name.replace(' ', '-')}"
        model, history = trainer.train_stage(model, bits if last else stage_bits, stage_epochs,
                                             folder, last)
        if last and isinstance(bits, Mapping):
            name = ", ".join(f"{pattern} {b}" for pattern, b in bits.items())
        trainer.stages.append(Stage(name, stage_bits, stage_epochs, history))
    trainer.save_stages()
    return Hardened(model, tuple(trainer.stages))
