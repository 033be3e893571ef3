"""Ablation: a table of the float, hardened float, converted and hardened converted model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attacks.suites import check_suite, listed
from ..certification.certifier import certificate_of
from ..conversion.converter import conversion_of
from ..core.distributed import distributed
from ..core.errors import SpecError
from ..core.metadata import annotate, resolved
from ..core.module_utils import check_model, frozen, ordinary, unwrap
from ..core.progress import say
from ..core.runtime import entry_point, seconds_of, seeded
from ..core.specs import FLOAT_BITS, Threat, check_seed, plain
from ..data.batches import require_reiterable
from ..data.images import check_count, gather
from ..data.train_batches import hold_out
from ..evaluation.comparison import Comparison, compare
from ..nn.quant_activation import quantizers
from .certified import check_certified
from .hardening import hardened
from .optim import parameter_groups
from .prepare import prepare
from .recipes import Recipe, recipe_of
from .trainer import check_effort


@entry_point
def ablate(model: nn.Module, train_loader: Iterable[Any], test_loader: Iterable[Any],
           threat: Threat | None = None, *, bits: int | Mapping[str, int] | None = None,
           dynamic: bool | None = None, recipe: str | Recipe = "pgd", epochs: int = 3,
           train: str = "all", val: Iterable[Any] | None = None,
           suite: str | Sequence[Any] = "standard", images: int | None = None,
           run_dir: str | os.PathLike[str] | None = None, seed: int = 0,
           device: str | torch.device | None = None, progress: bool = True,
           certify: bool = False, budget: float | str | None = None) -> Comparison:
    """Return a table of four models: float and converted, each with and without the fine-tune.

    The effect of quantization is the difference between the last row and the second one, since both
    are fine-tuned.

    Args:
        model: a float classifier; it does not change.
        train_loader, test_loader: images for the fine-tunes, and for the evaluation.
        threat: of the fine-tunes and of the evaluation; None: the model's own, as in
            :func:`evaluate`.
        bits, dynamic, recipe, epochs, train, val: as :func:`harden`.
        suite, images, certify, budget: as :func:`compare`.
        run_dir: folder for the state of every part; the same call again resumes there.
        seed, device, progress: as :func:`harden`.

    Raises:
        SpecError: a converted model, or as :func:`harden`.
        DataError, ConversionError: as :func:`harden`.
    """
    check_model(model)
    model = ordinary(unwrap(model))
    epochs, seed, images = plain(epochs), plain(seed), plain(images)
    bits = {k: plain(v) for k, v in bits.items()} if isinstance(bits, Mapping) else plain(bits)
    if conversion_of(model) is not None:
        raise SpecError("ablate starts from a float model, and this one is converted",
                        fix="quantguard.restore(model) gives the float one.")
    if bits == FLOAT_BITS:
        raise SpecError("ablate compares float with quantized, and bits=32 is float",
                        fix="Use bits=1 to 8.")
    threat = resolved(model, threat, progress)
    check_seed(seed)
    with frozen(model):  # raises before any work if the model cannot be measured
        pass
    chosen = recipe_of(recipe)
    # refuse before the fine-tunes what the evaluation would refuse
    check_effort(epochs, train)
    suite = listed(suite)
    check_suite(suite)
    check_count(images)
    require_reiterable(test_loader, "the test loader")
    if budget is not None:
        seconds_of(budget)
    where = None if run_dir is None else Path(run_dir)
    rows: dict[str, nn.Module] = {"float": model}
    training: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fit warns about the loader
        source = hold_out(train_loader, val, chosen.batch_size, seed)
    if chosen.certifies:
        check_certified(threat, train)
    converted = prepare(model, source.whole(), bits, dynamic, Recipe("clean"), threat, seed)
    annotate(converted, threat=threat)
    distributed().same(converted)
    for one in (model, converted) if certify else ():  # two images show if it can be certified
        with seeded(seed):
            some = gather(one, test_loader, threat, 2)
        certificate_of(one, some, threat, "ibp")
    # settings of weights apply to the float row only, if the other trains only thresholds
    own = chosen if train == "all" else replace(chosen, lr=None, weight_decay=None, awp=0.0)
    parameter_groups(converted, own, 1.0, train)  # raises where there is nothing to train
    table = {site: module.spec for site, module in quantizers(converted).items()}
    widths = sorted({spec.bits for spec in table.values()})
    kinds = "dynamic" if any(spec.dynamic for spec in table.values()) else "fixed"
    name = f"{'-to-'.join(map(str, dict.fromkeys((widths[0], widths[-1]))))}-bit {kinds}"
    plans: tuple[tuple[str, int | Mapping[str, int] | None, Recipe, str], ...] = (
        ("float + fine-tune", FLOAT_BITS, chosen, "all"),
        (f"{name} + fine-tune", bits, own, train))
    for row, row_bits, row_recipe, row_train in plans:
        if progress:
            say(row)
        made = hardened(
            model, train_loader, threat, bits=row_bits,
            dynamic=None if row_bits == FLOAT_BITS else dynamic, epochs=epochs,
            recipe=row_recipe, train=row_train, val=val, seed=seed, device=device,
            progress=progress, run_dir=None if where is None else where / row.replace(" ", "-"))
        rows[row], training[row] = made.model, made.to_dict()
    ordered = {"float": rows["float"], "float + fine-tune": rows["float + fine-tune"],
               name: converted, f"{name} + fine-tune": rows[f"{name} + fine-tune"]}
    rated = compare(ordered, test_loader, threat, suite=suite, images=images,
                    run_dir=None if where is None else where / "evaluation", seed=seed,
                    device=device, progress=progress, certify=certify, budget=budget)
    sampler = source.sampler
    settings = {"bits": dict(bits) if isinstance(bits, Mapping) else widths[0],
                "sites": {site: spec.bits for site, spec in table.items()},
                "dynamic": kinds == "dynamic", "recipe": chosen.to_dict(), "epochs": epochs,
                "train": train, "seed": seed, "val given": val is not None,
                **({} if sampler is None else {"batch_size": sampler.batch,
                                               "training_images": sampler.size}),
                "training": training}
    return Comparison(rated.rows, (*rated.notes, *_rates(training)), settings, ordered)


def _rates(training: Mapping[str, Any]) -> list[str]:
    """Return a note if the fine-tunes chose different learning rates."""
    found = {row: f"{made['stages'][-1]['lr']:.2g}" for row, made in training.items()}
    if len(set(found.values())) == 1:
        return []
    listed = ", ".join(f"{row} {lr}" for row, lr in found.items())
    return [f"peak learning rates, each from its model's own gradients: {listed}"]
