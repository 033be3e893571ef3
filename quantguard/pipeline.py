"""Compose the rooms: compare, ablate. No logic of their own."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .activation import staircases
from .attacks.suites import check_suite, listed
from .batches import require_reiterable, unpack
from .batching import hold_out
from .certification import certificate_of
from .certifying import check
from .conversion import conversion_of
from .crossed import crossed
from .entrance import is_input
from .errors import ConversionError, DataError, SpecError
from .evaluation import evaluate
from .files import write_text
from .hardening import hardened
from .images import check_count, gather, image_tensor
from .masking import mcnemar
from .metadata import annotate, resolved, shared
from .optimizing import parameter_groups
from .preparing import prepare
from .progress import say
from .recipes import Recipe, recipe_of
from .results import Evaluation, same_images
from .running import (
    check_model,
    entry_point,
    frozen,
    ordinary,
    seconds_of,
    seeded,
    unwrap,
)
from .spec import FLOAT_BITS, Threat, check_seed, plain
from .training import check_effort
from .world import world


@dataclass(frozen=True, eq=False)
class Comparison:
    """Hold evaluations of several models on the same images by the same attacks.

    Attributes:
        rows: the evaluation of each model, by name.
        notes: what a reader must know beside the figures.
        settings: how the models were made, where :func:`ablate` made them.
        models: the models that :func:`ablate` made; not part of the JSON.
    """

    rows: dict[str, Evaluation]
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    models: dict[str, nn.Module] = field(default_factory=dict, repr=False, compare=False)

    def paired(self, first: str, second: str) -> tuple[int, int, float]:
        """Return images that only first survives, only second, and the exact McNemar p-value."""
        a, b = self.rows[first].survived, self.rows[second].survived
        only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
        return only_a, only_b, mcnemar(only_a, only_b)

    def __str__(self) -> str:
        from .report import comparison_text
        return comparison_text(self)

    def _repr_html_(self) -> str:
        from .report import comparison_html
        return comparison_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but models and adversarials, as plain JSON types."""
        return {"rows": {name: e.to_dict() for name, e in self.rows.items()},
                "notes": list(self.notes), "settings": self.settings}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Comparison:
        """Read what :meth:`to_dict` wrote.

        Raises:
            DataError: not such a dictionary.
        """
        try:
            return cls({k: Evaluation.from_dict(v) for k, v in data["rows"].items()},
                       tuple(data["notes"]), data["settings"])
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError("this is no comparison JSON of quantguard", why=repr(error)) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, or a self-contained page, as path ends in ``.json`` or ``.html``.

        Raises:
            SpecError: path ends in neither.
        """
        suffix = Path(path).suffix
        if suffix == ".html":
            self.save_page(path)
        elif suffix == ".json":
            write_text(path, json.dumps(self.to_dict(), indent=1))
        else:
            raise SpecError(f"{path} ends in neither .json nor .html")

    def save_page(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained HTML page, whatever path ends in."""
        from .report import page
        write_text(path, page(self))


@entry_point
def compare(models: Mapping[str, nn.Module], loader: Iterable[Any],
            threat: Threat | None = None, *, suite: str | Sequence[Any] = "standard",
            images: int | None = None, run_dir: str | os.PathLike[str] | None = None,
            seed: int = 0, device: str | torch.device | None = None, progress: bool = True,
            certify: bool = False, budget: float | str | None = None) -> Comparison:
    """Evaluate several models on the same images by the same attacks.

    Afterwards each model meets the images that broke the others.

    Args:
        models: by name, in the order of the table.
        loader, suite, images, run_dir, seed, device, progress, certify: as
            :func:`quantguard.evaluate`.
        threat: the same; None: what the models have in common.
        budget: the same, for each model; what one's time did not suffice for its row lists.

    Raises:
        SpecError: models made for images of different mean, std or bounds, or for different radii
            where no threat is given.
        SpecError, DataError, ConversionError: as :func:`quantguard.evaluate`.
    """
    if not models:
        raise SpecError("no models to compare")
    if budget is not None:
        seconds_of(budget)  # before any work
    for model in models.values():
        check_model(model)
    threat = shared(models.items(), threat, progress)
    check_seed(seed)
    seed, images = plain(seed), plain(images)
    given, models = models, {name: ordinary(model) if isinstance(model, nn.Module) else model
                             for name, model in models.items()}
    rows = {}
    suite = listed(suite)
    for number, (name, model) in enumerate(models.items()):
        if progress:
            say(f"[{number + 1}/{len(models)}] {name}")
        directory = None if run_dir is None else Path(run_dir) / _folder(number, name)
        try:
            rows[name] = evaluate(model, loader, threat, suite=suite, images=images, seed=seed,
                                  run_dir=directory, device=device, progress=progress,
                                  certify=certify, budget=budget)
        except ConversionError as error:
            raise ConversionError(f"{name}: {error.what}", error.why, error.fix) from error
    same_images(rows.values())
    with seeded(seed):  # a loader that shuffles draws
        key, _ = image_tensor(unpack(next(iter(loader)))[0], "batch 0 of the loader")
    rows = crossed(models, rows, key)
    notes = []
    if all(any(not is_input(name) for name in staircases(model)) for model in models.values()):
        notes.append("no float control among the rows")
    return Comparison(rows, tuple(notes), {}, dict(given))


def _folder(number: int, name: str) -> str:
    """Return where a row is kept: by its name, for other models have other suites."""
    return f"{number}-{re.sub(r'[^0-9A-Za-z.]+', '-', name)[-60:]}"


@entry_point
def ablate(model: nn.Module, train_loader: Iterable[Any], test_loader: Iterable[Any],
           threat: Threat | None = None, *, bits: int | Mapping[str, int] | None = None,
           dynamic: bool | None = None, recipe: str | Recipe = "pgd", epochs: int = 3,
           train: str = "all", val: Iterable[Any] | None = None,
           suite: str | Sequence[Any] = "standard", images: int | None = None,
           run_dir: str | os.PathLike[str] | None = None, seed: int = 0,
           device: str | torch.device | None = None, progress: bool = True,
           certify: bool = False, budget: float | str | None = None) -> Comparison:
    """Return the four-way table: float; float + the fine-tune; converted; converted + the same.

    What quantization gives is the last row against the second, never against the first.

    Args:
        model: a float classifier; it is not touched.
        train_loader, test_loader: for the fine-tunes, and for the figures.
        threat: of both; None: the model's own, as in :func:`evaluate`.
        bits, dynamic, recipe, epochs, train, val: as :func:`harden`.
        suite, images, certify, budget: as :func:`compare`.
        run_dir: keeps the state of every part; the same call again goes on from there.
        seed, device, progress: as elsewhere.

    Raises:
        SpecError: a model that is converted already, or as :func:`harden`.
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
    with frozen(model):  # raises before any work where the model could not be measured
        pass
    chosen = recipe_of(recipe)
    # what the evaluation would refuse, too, before the fine-tunes
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
        warnings.simplefilter("ignore")  # training says what there is to say of the loader
        source = hold_out(train_loader, val, chosen.batch_size, seed)
    if chosen.certifies:
        check(threat, train)
    converted = prepare(model, source.whole(), bits, dynamic, Recipe("clean"), threat, seed)
    annotate(converted, threat=threat)
    world().same(converted)
    for one in (model, converted) if certify else ():  # of two images, for what has no certificate
        with seeded(seed):
            some = gather(one, test_loader, threat, 2)
        certificate_of(one, some, threat, "ibp")
    # settings of weights are the float row's where thresholds alone are trained
    own = chosen if train == "all" else replace(chosen, lr=None, weight_decay=None, awp=0.0)
    parameter_groups(converted, own, 1.0, train)  # raises where there is nothing to train
    table = {site: module.spec for site, module in staircases(converted).items()}
    widths = sorted({spec.bits for spec in table.values()})
    kinds = "dynamic" if any(spec.dynamic for spec in table.values()) else "fixed"
    name = f"{'-to-'.join(str(b) for b in {widths[0]: 0, widths[-1]: 0})}-bit {kinds}"
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
    """Say so where fine-tunes found different learning rates of their own."""
    found = {row: f"{made['stages'][-1]['lr']:.2g}" for row, made in training.items()}
    return [] if len(set(found.values())) == 1 else [
        "peak learning rates, each from its model's own gradients: "
        + ", ".join(f"{row} {lr}" for row, lr in found.items())]
