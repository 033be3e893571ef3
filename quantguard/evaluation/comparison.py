"""Comparison of several models on the same images under the same attacks."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attacks.suites import listed
from ..core.errors import ConversionError, DataError, SpecError
from ..core.file_io import write_text
from ..core.metadata import shared
from ..core.module_utils import check_model, ordinary
from ..core.progress import say
from ..core.rendering import as_html, as_page, as_text
from ..core.runtime import entry_point, seconds_of, seeded
from ..core.specs import Threat, check_seed, plain
from ..core.statistics import mcnemar
from ..data.batches import unpack
from ..data.images import image_tensor
from ..nn.input_quantizer import is_input
from ..nn.quant_activation import quantizers
from .evaluator import evaluate
from .results import Evaluation, same_images
from .transfer import transferred


@dataclass(frozen=True, eq=False)
class Comparison:
    """Evaluations of several models on the same images under the same attacks.

    Attributes:
        rows: the evaluation of each model, by name.
        notes: remarks that a reader of the figures needs.
        settings: how :func:`quantguard.ablate` made the models; else empty.
        models: the models; not part of the JSON.
    """

    rows: dict[str, Evaluation]
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    models: dict[str, nn.Module] = field(default_factory=dict, repr=False, compare=False)

    def paired(self, first: str, second: str) -> tuple[int, int, float]:
        """Return how many images survive only first, only second, and the exact McNemar p-value."""
        a, b = self.rows[first].survived, self.rows[second].survived
        only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
        return only_a, only_b, mcnemar(only_a, only_b)

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

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
        """Write a JSON file or a self-contained page, by the suffix: ``.json`` or ``.html``.

        Raises:
            SpecError: another suffix.
        """
        suffix = Path(path).suffix
        if suffix == ".html":
            self.save_page(path)
        elif suffix == ".json":
            write_text(path, json.dumps(self.to_dict(), indent=1))
        else:
            raise SpecError(f"{path} ends in neither .json nor .html")

    def save_page(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained HTML page, whatever the suffix."""
        write_text(path, as_page(self))


@entry_point
def compare(models: Mapping[str, nn.Module], loader: Iterable[Any],
            threat: Threat | None = None, *, suite: str | Sequence[Any] = "standard",
            images: int | None = None, run_dir: str | os.PathLike[str] | None = None,
            seed: int = 0, device: str | torch.device | None = None, progress: bool = True,
            certify: bool = False, budget: float | str | None = None) -> Comparison:
    """Evaluate several models on the same images under the same attacks.

    Afterwards the adversarials of each model are tried on the others.

    Args:
        models: by name, in the order of the table.
        loader, suite, images, run_dir, seed, device, progress, certify: as
            :func:`quantguard.evaluate`.
        threat: as :func:`quantguard.evaluate`; None: the models' common threat.
        budget: time limit of each model; its row lists what there was no time for.

    Raises:
        SpecError: models made for images of different mean, std or bounds, or, without a threat,
            for different eps.
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
    ordinary_models = {name: ordinary(model) if isinstance(model, nn.Module) else model
                       for name, model in models.items()}
    rows = {}
    suite = listed(suite)
    for number, (name, model) in enumerate(ordinary_models.items()):
        if progress:
            say(f"[{number + 1}/{len(ordinary_models)}] {name}")
        directory = None if run_dir is None else Path(run_dir) / _folder(number, name)
        try:
            rows[name] = evaluate(model, loader, threat, suite=suite, images=images, seed=seed,
                                  run_dir=directory, device=device, progress=progress,
                                  certify=certify, budget=budget)
        except ConversionError as error:
            raise ConversionError(f"{name}: {error.what}", error.why, error.fix) from error
    same_images(rows.values())
    with seeded(seed):  # for a loader that shuffles
        key, _ = image_tensor(unpack(next(iter(loader)))[0], "batch 0 of the loader")
    rows = transferred(ordinary_models, rows, key)
    notes = []
    if all(any(not is_input(name) for name in quantizers(model))
           for model in ordinary_models.values()):
        notes.append("no float control among the rows")
    return Comparison(rows, tuple(notes), {}, dict(models))


def _folder(number: int, name: str) -> str:
    """Return the name of a row's run directory.

    Each row has its own, because the suite depends on the model.
    """
    return f"{number}-{re.sub(r'[^0-9A-Za-z.]+', '-', name)[-60:]}"
