"""Compose the rooms: harden, compare, ablate. No logic of their own."""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .activation import bypass, staircases
from .attacks import logits_of
from .batches import unpack
from .conversion import conversion_of, convert, unwrap
from .crossed import crossed
from .errors import DataError, SpecError
from .evaluation import evaluate
from .files import write_text
from .images import image_tensor
from .masking import mcnemar
from .recipes import Recipe, recipe_of
from .results import Evaluation
from .running import device_of, evaluating, run, seeded, to_device, usable_device
from .spec import FLOAT_BITS, QuantSpec, Threat
from .training import History, fit


def harden(model: nn.Module, loader: Iterable[Any], threat: Threat = Threat(), *,
           bits: int | None = None, dynamic: bool | None = None, recipe: str | Recipe = "pgd",
           epochs: int = 3, train: str = "all", val: Iterable[Any] | None = None,
           run_dir: str | os.PathLike[str] | None = None, seed: int = 0,
           device: str | torch.device | None = None, progress: bool = True) -> nn.Module:
    """Return a copy of model, quantized where it is not yet, and adversarially fine-tuned.

    Args:
        model: a float or a converted classifier; it is not touched.
        loader: re-iterable of (images, labels). Of a map-style DataLoader a seeded 5 % is held
            out, on which a probe picks the best epoch.
        threat: the attacker to train against, in pixel units; mean and std where the loader
            normalises.
        bits: 1 to 8, or 32 for a float control; None: as converted already, else 2.
        dynamic: learned thresholds; None: as converted already, else True.
        recipe: ``pgd``, ``nfgsm``, ``clean``, or a :class:`quantguard.Recipe`.
        epochs: passes over the loader.
        train: ``all``, or ``thresholds`` for thresholds and steps only.
        val: batches for the probe instead of a held-out slice; never the test set.
        run_dir: keeps metrics and state; the same call again goes on from there.
        seed: of order, random starts and the held-out slice.
        device: where to train; None: where the model is.
        progress: whether to show it.

    Returns:
        The hardened copy, in the mode the model came in, on its device.

    Raises:
        SpecError: settings that contradict each other or the model.
        DataError: a batch that does not fit; its number is named.
        ConversionError: a model that cannot be converted.

    Example:
        >>> hardened = harden(model, loader, Threat(eps=0.1))  # doctest: +SKIP
    """
    return harden_with_history(model, loader, threat, bits=bits, dynamic=dynamic, recipe=recipe,
                               epochs=epochs, train=train, val=val, run_dir=run_dir, seed=seed,
                               device=device, progress=progress)[0]


def harden_with_history(model: nn.Module, loader: Iterable[Any], threat: Threat, *,
                        bits: int | None, dynamic: bool | None, recipe: str | Recipe, epochs: int,
                        train: str, val: Iterable[Any] | None,
                        run_dir: str | os.PathLike[str] | None, seed: int,
                        device: str | torch.device | None,
                        progress: bool) -> tuple[nn.Module, History]:
    """Do what :func:`harden` does, and return how it went, too."""
    model, chosen = unwrap(model), recipe_of(recipe)
    if device is not None:
        usable_device(device)  # before any work
    before = next((p.device for p in model.parameters()), torch.device("cpu"))
    result = prepare(model, loader, bits, dynamic, chosen)
    if device is not None:
        result.to(usable_device(device))
    history = fit(result, loader, threat, chosen, epochs=epochs, train=train, val=val,
                  run_dir=run_dir, seed=seed, progress=progress)
    return result.to(before), history


def prepare(model: nn.Module, loader: Iterable[Any], bits: int | None,
            dynamic: bool | None, recipe: Recipe) -> nn.Module:
    """Return the copy that is trained: converted as asked, or as it is converted already.

    Raises:
        SpecError: bits or dynamic contradict the model's conversion.
    """
    done = {(m.spec.bits, m.spec.dynamic) for m in staircases(model).values()}
    if done:
        for name, asked, have in (("bits", bits, {b for b, _ in done}),
                                  ("dynamic", dynamic, {d for _, d in done})):
            if asked is not None and have != {asked}:
                raise SpecError(
                    f"{name}={asked} contradicts the model, which is converted with {name}="
                    f"{', '.join(map(str, sorted(have)))}",
                    fix=f"Leave {name} out, or quantguard.restore(model) first.")
        return copy.deepcopy(model)
    if bits == FLOAT_BITS:
        return copy.deepcopy(model)
    spec = QuantSpec(2 if bits is None else bits, True if dynamic is None else dynamic)
    wanted = recipe.range_factor or 1.0
    # Finer steps make a small net sturdier and may leave a deep one with nothing to start from.
    for factor in dict.fromkeys((wanted, (1 + wanted) / 2, 1.0)):
        converted = convert(model, replace(spec, range_factor=factor), data=loader)
        if factor == 1.0 or agreement(converted, loader) >= 0.5:
            break
    return converted


def agreement(model: nn.Module, loader: Iterable[Any]) -> float:
    """Return the share of a loader's first images on which model answers as under ``bypass``."""
    same = total = 0
    device = device_of(model)
    with torch.no_grad(), evaluating(model), seeded(0):
        for batch in itertools.islice(loader, 4):
            inputs = to_device(unpack(batch)[0], device)
            answers = logits_of(run(model, inputs)).argmax(1)
            with bypass(model):
                same += int((logits_of(run(model, inputs)).argmax(1) == answers).sum())
            total += len(answers)
    return same / max(total, 1)


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


def compare(models: Mapping[str, nn.Module], loader: Iterable[Any], threat: Threat = Threat(), *,
            suite: str | Sequence[Any] = "standard", images: int | None = None,
            run_dir: str | os.PathLike[str] | None = None, seed: int = 0,
            device: str | torch.device | None = None, progress: bool = True) -> Comparison:
    """Evaluate several models on the same images by the same attacks.

    Afterwards each model meets the images that broke the others.

    Args:
        models: by name, in the order of the table.
        loader, threat, suite, images, run_dir, seed, device, progress: as
            :func:`quantguard.evaluate`.

    Raises:
        SpecError, DataError, ConversionError: as :func:`quantguard.evaluate`.
    """
    if not models:
        raise SpecError("no models to compare")
    rows = {}
    for number, (name, model) in enumerate(models.items()):
        if progress:
            print(f"[{number + 1}/{len(models)}] {name}", flush=True, file=_stderr())
        directory = None if run_dir is None else Path(run_dir) / f"{number}"
        rows[name] = evaluate(model, loader, threat, suite=suite, images=images, run_dir=directory,
                              seed=seed, device=device, progress=progress)
    if len({e.image_hash for e in rows.values()}) > 1:
        raise DataError("the loader gives each model other images",
                        why="It shuffles by a generator of its own.",
                        fix="Give a loader that does not shuffle.")
    key, _ = image_tensor(unpack(next(iter(loader)))[0], "batch 0 of the loader")
    rows = crossed(models, rows, key)
    quantized = [name for name, model in models.items() if staircases(model)]
    notes = []
    if quantized and len(quantized) == len(models):
        notes.append("no float control among the rows")
    return Comparison(rows, tuple(notes), {}, dict(models))


def _stderr() -> Any:
    import sys
    return sys.stderr


def ablate(model: nn.Module, train_loader: Iterable[Any], test_loader: Iterable[Any],
           threat: Threat = Threat(), *, bits: int | None = None, dynamic: bool | None = None,
           recipe: str | Recipe = "pgd", epochs: int = 3, train: str = "all",
           val: Iterable[Any] | None = None, suite: str | Sequence[Any] = "standard",
           images: int | None = None, run_dir: str | os.PathLike[str] | None = None,
           seed: int = 0, device: str | torch.device | None = None,
           progress: bool = True) -> Comparison:
    """Return the four-way table: float; float + the fine-tune; converted; converted + the same.

    What quantization gives is the last row against the second, never against the first.

    Args:
        model: a float classifier; it is not touched.
        train_loader, test_loader: for the fine-tunes, and for the figures.
        threat: of both.
        bits, dynamic, recipe, epochs, train, val: as :func:`harden`.
        suite, images: as :func:`quantguard.evaluate`.
        run_dir: keeps the state of every part; the same call again goes on from there.
        seed, device, progress: as elsewhere.

    Raises:
        SpecError: a model that is converted already, or as :func:`harden`.
        DataError, ConversionError: as :func:`harden`.
    """
    model = unwrap(model)
    if conversion_of(model) is not None:
        raise SpecError("ablate starts from a float model, and this one is converted",
                        fix="quantguard.restore(model) gives the float one.")
    if bits == FLOAT_BITS:
        raise SpecError("ablate compares float with quantized, and bits=32 is float",
                        fix="Use bits=1 to 8.")
    chosen = recipe_of(recipe)
    where = None if run_dir is None else Path(run_dir)
    rows: dict[str, nn.Module] = {"float": model}
    training: dict[str, Any] = {}
    converted = prepare(model, train_loader, bits, dynamic, Recipe("clean"))
    spec = next(iter(staircases(converted).values())).spec
    name = f"{spec.bits}-bit {'dynamic' if spec.dynamic else 'fixed'}"
    plans: tuple[tuple[str, int | None, str], ...] = (
        ("float + fine-tune", FLOAT_BITS, "all"), (f"{name} + fine-tune", bits, train))
    for row, row_bits, row_train in plans:
        if progress:
            print(row, flush=True, file=_stderr())
        rows[row], history = harden_with_history(
            model, train_loader, threat, bits=row_bits,
            dynamic=None if row_bits == FLOAT_BITS else dynamic, recipe=chosen, epochs=epochs,
            train=row_train, val=val, seed=seed, device=device, progress=progress,
            run_dir=None if where is None else where / row.replace(" ", "-"))
        training[row] = history.to_dict()
    ordered = {"float": rows["float"], "float + fine-tune": rows["float + fine-tune"],
               name: converted, f"{name} + fine-tune": rows[f"{name} + fine-tune"]}
    table = compare(ordered, test_loader, threat, suite=suite, images=images,
                    run_dir=None if where is None else where / "evaluation", seed=seed,
                    device=device, progress=progress)
    settings = {"recipe": chosen.to_dict(), "epochs": epochs, "train": train, "seed": seed,
                "training": training}
    return Comparison(table.rows, table.notes, settings, ordered)
