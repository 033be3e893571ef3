"""Harden a model: convert it, and fine-tune it stage by stage, until bits are as low as asked."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .activation import staircases
from .attacks import PixelModel, logits_of
from .batching import Source, hold_out
from .certifying import check
from .conversion import conversion_of, inspect, restore
from .entrance import is_input
from .errors import SpecError
from .files import write_text
from .held import has_labels
from .history import History
from .images import check_images_shape, image_tensor
from .metadata import (
    ModelMetadata,
    annotate,
    check_classes,
    check_shape,
    class_names_of,
    known_of,
    resolved,
)
from .preparing import first_inputs, prepare
from .probing import PixelBatches, parent_accuracy
from .progress import say
from .recipes import Recipe, recipe_of, stages
from .running import (
    check_model,
    check_numbers,
    device_of,
    duplicate,
    entry_point,
    evaluating,
    of_other_tensors,
    ordinary,
    run,
    seeded,
    unwrap,
    usable_device,
)
from .sensitive import costs
from .spec import FLOAT_BITS, Threat, check_seed, plain
from .training import check_effort, fit
from .world import world

# The bits that a goal is looked for at, one after the other.
_LADDER = (8, 4, 3, 2)
# Below this share of the clean accuracy that a model came with a user should know.
_BEHIND = 0.85


@dataclass(frozen=True)
class Stage:
    """Hold one stage of a walk down in bits: its name, what it trained, how it went."""

    name: str
    bits: int
    epochs: int
    history: History
    holds: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"name": self.name, "bits": self.bits, "epochs": self.epochs, "holds": self.holds,
                **{f"history_{k}" if k == "epochs" else k: v
                   for k, v in self.history.to_dict().items()}}


@dataclass(frozen=True)
class Hardened:
    """Hold a hardened model, and the stages that it went through."""

    model: nn.Module = field(repr=False)
    stages: tuple[Stage, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the model, as plain JSON types."""
        return {"stages": [stage.to_dict() for stage in self.stages]}


@entry_point
def harden(model: nn.Module, loader: Iterable[Any], threat: Threat | None = None, *,
           bits: int | Mapping[str, int] | None = None, dynamic: bool | None = None,
           recipe: str | Recipe = "pgd", epochs: int = 3, train: str = "all",
           val: Iterable[Any] | None = None, max_clean_drop: float | None = None,
           run_dir: str | os.PathLike[str] | None = None, seed: int = 0,
           device: str | torch.device | None = None, progress: bool = True) -> nn.Module:
    """Return a copy of model, quantized where it is not yet, and adversarially fine-tuned.

    Args:
        model: a float or a converted classifier; it is not touched.
        loader: re-iterable of (images, labels). Of a map-style DataLoader a seeded 5 % is held
            out, on which a probe picks the best epoch; what its data set does to images (random
            transforms, say) is done to these, too: give ``val`` where that is not wanted.
        threat: the attacker to train against, in pixel units; mean and std where the loader
            normalises. None: the model's own, else ``Threat()``.
        bits: 1 to 8, or 32 for a float control; for a float model also {pattern: bits}, patterns
            as in :func:`convert`; None: as converted already, else 2.
        dynamic: learned thresholds; None: as converted already, else False: that learning them
            helps has not been shown (benchmarks/learned.py).
        recipe: ``pgd``, ``trades``, ``nfgsm``, ``clean``, ``ibp``, or a
            :class:`quantguard.Recipe`. In Linf the first two and the last put an 8-bit staircase
            on the input, unless ``input_bits=0``. ``ibp`` trains for a certificate: it starts
            afresh, unless ``init="keep"``, and keeps the epoch that certifies most held-out images.
        epochs: passes over the loader, in all stages together.
        train: ``all``, or ``thresholds`` for thresholds and steps only.
        val: batches for the probe instead of a held-out slice; never the test set.
        max_clean_drop: fine-tune in float for ``epochs``, and from there for as many again in
            float and, one after the other, in 8, 4, 3 bits and ``bits``, while held-out clean
            accuracy is at most so much (0 to 1) below that float's; return the lowest that holds.
        run_dir: keeps metrics and state; the same call again goes on from there. One that asks for
            more epochs than a run had goes on from what that returned: the epochs that there were
            stay as they are, and those that are new get another course of the learning rate, up to
            the same peak and down again. A walk may get more in its last stage alone.
        seed: of order, random starts and the held-out slice.
        device: where to train; None: where the model is.
        progress: whether to show it.

    Returns:
        The hardened copy, in the mode the model came in, on its device. Its attribute
        ``quantguard`` holds threat, classes and input shape; :func:`quantguard.save` keeps them,
        and every function that takes the copy uses them.

    Raises:
        SpecError: settings that contradict each other or the model.
        DataError: a batch that does not fit; its number is named.
        ConversionError: a model that cannot be converted.

    Example:
        >>> hardened = harden(model, loader, Threat(eps=0.1))  # doctest: +SKIP
    """
    return hardened(model, loader, threat, bits=bits, dynamic=dynamic, recipe=recipe,
                    epochs=epochs, train=train, val=val, max_clean_drop=max_clean_drop,
                    run_dir=run_dir, seed=seed, device=device, progress=progress).model


def hardened(model: nn.Module, loader: Iterable[Any], threat: Threat | None, *,
             bits: int | Mapping[str, int] | None, dynamic: bool | None, recipe: str | Recipe,
             epochs: int, train: str, val: Iterable[Any] | None,
             run_dir: str | os.PathLike[str] | None, seed: int,
             device: str | torch.device | None, progress: bool,
             max_clean_drop: float | None = None) -> Hardened:
    """Do what :func:`harden` does, and return how it went, too."""
    model, chosen = unwrap(model), recipe_of(recipe)
    check_model(model)
    threat = resolved(model, threat, progress)
    check_seed(seed)
    if threat.eps == 0 and (chosen.attacks or chosen.certifies):
        raise SpecError(f"eps=0 leaves recipe {chosen.name} nothing to train against",
                        fix="Use recipe clean, or an eps above 0.")
    bits = {k: plain(v) for k, v in bits.items()} if isinstance(bits, Mapping) else plain(bits)
    epochs, seed, max_clean_drop = plain(epochs), plain(seed), plain(max_clean_drop)
    if isinstance(bits, Mapping):
        bits = _table(model, bits)
    if device is not None:
        usable_device(device)  # before any work
    check_effort(epochs, train)
    check_numbers(model)
    other = of_other_tensors(model)
    if other is not None:
        raise SpecError(f"{other[0]} of the model is of class {other[1]}, which cannot be trained",
                        why="Its weights have been quantized, by torchao, say.",
                        fix="Harden the float model, and quantize its weights afterwards.")
    model = ordinary(model)
    walk = Walk(model, loader, threat, dynamic, chosen, train, val,
                None if run_dir is None else Path(run_dir), seed, device, progress)
    if max_clean_drop is not None and isinstance(bits, Mapping):
        raise SpecError("max_clean_drop walks down in bits, the same at every site",
                        fix="Use bits=1 to 8.")
    if known_of(model) != vars(ModelMetadata()):
        known = walk.described(model)
        check_classes(model, known["class_names"], known["outputs"])
    if isinstance(bits, Mapping) or max_clean_drop is None:
        made = walk.to_bits(bits, epochs)
    else:
        made = walk.to_goal(2 if bits is None else bits, epochs, max_clean_drop)
    known = walk.described(made.model)
    outputs, names = known.pop("outputs"), known["class_names"]
    annotate(made.model, threat=threat, num_classes=len(names) if names else outputs, **known)
    return made


class Walk:
    """Go down in bits: every stage starts from what the one before has learned."""

    def __init__(self, model: nn.Module, loader: Iterable[Any], threat: Threat,
                 dynamic: bool | None, recipe: Recipe, train: str, val: Iterable[Any] | None,
                 run_dir: Path | None, seed: int, device: str | torch.device | None,
                 progress: bool) -> None:
        self.model, self.loader, self.threat, self.dynamic = model, loader, threat, dynamic
        self.recipe, self.train, self.val, self.run_dir = recipe, train, val, run_dir
        self.seed, self.device, self.progress = seed, device, progress
        self.stages: list[Stage] = []

    def to_bits(self, bits: int | Mapping[str, int] | None, epochs: int) -> Hardened:
        """Go through the recipe's own walk."""
        there = [m.spec.bits for name, m in staircases(self.model).items() if not is_input(name)]
        wanted = min(bits.values(), default=2) if isinstance(bits, Mapping) else \
            min(there, default=2) if bits is None else bits
        plan = [(wanted, epochs)]
        if not staircases(self.model) and self.train == "all":
            plan = stages(self.recipe, wanted, epochs)
        if self.recipe.walk and len(plan) == 1 and wanted != FLOAT_BITS:
            self._say("walk= is left out: it needs a float model, train='all', bits above the "
                      "last ones, and two epochs at least")
        model = self.model
        for stage_bits, stage_epochs in plan:
            last = (stage_bits, stage_epochs) == plan[-1]
            model, history = self._stage(
                model, bits if last else stage_bits, stage_epochs, None if len(plan) == 1 else
                f"{len(self.stages) + 1}-{_name(stage_bits).replace(' ', '-')}", last)
            name = _name(stage_bits)
            if last and isinstance(bits, Mapping):
                name = ", ".join(f"{pattern} {b}" for pattern, b in bits.items())
            self.stages.append(Stage(name, stage_bits, stage_epochs, history))
        self._write()
        return Hardened(model, tuple(self.stages))

    def to_goal(self, lowest: int, epochs: int, drop: float) -> Hardened:
        """Go down while the clean accuracy holds.

        Raises:
            SpecError: a converted model, bits that are no step of the walk, or nothing held out.
        """
        if staircases(self.model):
            raise SpecError("max_clean_drop starts from a float model, and this one is converted",
                            fix="quantguard.restore(model) gives the float one.")
        if not isinstance(drop, (int, float)) or not 0 <= drop <= 1:
            raise SpecError(f"max_clean_drop={drop!r} must be from 0 to 1")
        if not isinstance(lowest, int) or not 1 <= lowest <= 8:
            raise SpecError(f"max_clean_drop walks down in bits, and bits={lowest!r} is none of "
                            "them", fix="Use bits=1 to 8.")
        if self.train != "all":
            raise SpecError(f"max_clean_drop starts with float, and train={self.train!r} leaves "
                            "nothing to train there", fix="Use train='all'.")
        if self.recipe.walk:
            raise SpecError("max_clean_drop has a walk of its own", fix="Leave walk= out.")
        held = self._source().val
        if held is None or not has_labels(held):
            raise SpecError("max_clean_drop needs held-out images with labels",
                            fix="Give a map-style DataLoader of some images, or val=.")
        # each starts from the same weights and has the same epochs, so that bits alone differ
        start = self.model
        if self.recipe.init == "keep":
            start = self._tried("float", start, FLOAT_BITS, epochs, None)[0]
        kept, clean = self._tried("float control", start, FLOAT_BITS, epochs, None)
        least = clean - drop
        for bits in [b for b in _LADDER if b > lowest] + [lowest]:
            model, clean = self._tried(_name(bits), start, bits, epochs, least)
            if not self.stages[-1].holds:
                found = self._one_site_more(kept, model, bits, least - clean)
                if found is not None:
                    table, site = found
                    name = f"{bits} bits, {site} {table[site]}"
                    model, _ = self._tried(name, start, table, epochs, least)
                    kept = model if self.stages[-1].holds else kept
                break
            kept = model
        if not any(not is_input(name) for name in staircases(kept)):
            self._say("no bits hold: the float model is returned")
        self._write()
        return Hardened(kept, tuple(self.stages))

    def _tried(self, name: str, start: nn.Module, bits: int | Mapping[str, int], epochs: int,
               least: float | None) -> tuple[nn.Module, float]:
        """Train a stage of the way to a goal, and say whether it holds; return it, and how clean.

        Args:
            least: the clean accuracy that is asked; None: what others are held against.
        """
        folder = re.sub(r"[^0-9A-Za-z.]+", "-", name)
        model, history = self._stage(start, bits, epochs, folder)
        clean = history.kept.clean
        if clean is None:
            raise SpecError("max_clean_drop needs held-out images with labels", fix="Give val=.")
        holds = least is None or clean >= least - 1e-9  # 0.7 - 0.01 is above 0.69
        lowest = min(bits.values()) if isinstance(bits, Mapping) else bits
        self.stages.append(Stage(name, lowest, epochs, history, holds))
        kind = "certified" if self.recipe.certifies else "attacked"
        probed = f", {kind} {history.kept.probe:.1%}" if history.kept.probe is not None and \
            (self.recipe.attacks or self.recipe.certifies) else ""
        asked = "" if least is None else \
            f": {'holds' if holds else 'too low'} (at least {least:.1%})"
        self._say(f"{name}: held-out clean {clean:.1%}{probed}{asked}")
        return model, clean

    def _one_site_more(self, kept: nn.Module, failed: nn.Module, bits: int,
                       lacking: float) -> tuple[dict[str, int], str] | None:
        """Return bits by site where one site is what hurts, its own as they were before, and it.

        Args:
            kept: the last model that holds.
            failed: the one that does not, for want of so much clean accuracy.
        """
        before = {name: m.spec.bits for name, m in staircases(kept).items() if not is_input(name)}
        found = costs(failed, self._source().some or (), self.threat, self.seed,
                      self.recipe.distill > 0)
        enough = [name for name, (clean, _) in found.items()
                  if not is_input(name) and 2 * clean >= lacking]
        if len(before) < 2 or not enough:
            self._say("no single site is what hurts")
            return None
        site = max(enough, key=lambda name: found[name][1])  # by attacked accuracy
        # By name each, and of what matches the last decides: names that others match come first.
        done = conversion_of(failed)
        early = {"first", "last", *(s.kind for s in (done.plan.sites if done else ()))}
        names = sorted(before, key=lambda name: (name not in early, len(name)))
        return {name: before[site] if name == site else bits for name in names}, site

    def _source(self) -> Source:
        """Return what trains and what is held out, as every stage has it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # training says what there is to say of the loader
            return hold_out(self.loader, self.val, self.recipe.batch_size, self.seed)

    def described(self, model: nn.Module) -> dict[str, Any]:
        """Return what the training images are: their shape, classes, and the model's outputs."""
        inputs = first_inputs(self._source().whole(), model)
        name, x = image_tensor(inputs, "the loader")
        check_images_shape(x, "the loader")
        check_shape(model, x.shape[1:], "the loader")
        with torch.no_grad(), evaluating(model), seeded(self.seed):
            answers = run(model, x[:2] if name is None else {name: x[:2]}, "the loader")
        return {"input_shape": tuple(x.shape[1:]), "outputs": logits_of(answers).shape[1],
                "class_names": class_names_of(self.loader)}

    def _stage(self, model: nn.Module, bits: int | Mapping[str, int] | None, epochs: int,
               name: str | None, extends: bool = False) -> tuple[nn.Module, History]:
        """Convert a model to bits, unless it came converted, and fine-tune it.

        Args:
            name: of the stage, where there are several.
            extends: whether it may go on from a run of fewer epochs: nothing starts from it.
        """
        before = device_of(model)
        dynamic = None if bits == FLOAT_BITS else self.dynamic
        if self.recipe.certifies:
            check(self.threat, self.train)
        afresh = self.recipe.init == "interval"
        if afresh:
            self._say("weights are drawn anew, as suits intervals; init=keep keeps them")
        where = self.device or world().device
        there = model
        if where is not None and before != usable_device(where):  # calibration is faster there, too
            there = duplicate(model).to(where)
        # in an order of ours, where it can be: a sorted data set begins with one class
        images = self._source().whole()
        result = prepare(there, images, bits, dynamic, self.recipe, self.threat, self.seed,
                         anew=model is not self.model)
        if not self.stages and any(map(is_input, staircases(result))) \
                and not any(map(is_input, staircases(model))):
            self._say(f"a staircase of {self.recipe.input_bits} bits stands on the input, which "
                      "swallows what eps moves at either end of the range; input_bits=0 "
                      "(--set input_bits=0): none")
        # statistics that came with the weights are of other activations, or of another input
        placed = staircases(result).keys() != staircases(model).keys()
        renew = model is not self.model or (placed and self.train == "all" and not afresh)
        directory = self.run_dir if self.run_dir is None or name is None else self.run_dir / name
        if name is not None:
            self._say(f"stage {name}, {epochs} epoch{'s' * (epochs > 1)}")
        history = fit(result, self.loader, self.threat, self.recipe, epochs=epochs,
                      train=self.train, val=self.val, run_dir=directory, seed=self.seed,
                      progress=self.progress, renew=renew, extends=extends)
        if afresh and history.kept.clean is not None:
            self._compare(model, history.kept.clean)
        return result.to(before), history

    def _compare(self, model: nn.Module, clean: float) -> None:
        """Say so where a model that was trained afresh is far behind the one that came."""
        asked = PixelModel(model, self.threat)
        with seeded(self.seed):
            came = parent_accuracy(asked, self._source().val, PixelBatches(asked, self.threat))
        if came is not None and clean < _BEHIND * came:
            self._say(f"warning: held-out clean accuracy is {clean:.1%}, and the model came with "
                      f"{came:.1%}: train longer, or for a smaller eps")

    def _say(self, text: str) -> None:
        if self.progress and world().first:
            say(text)

    def _write(self) -> None:
        if self.run_dir is not None and len(self.stages) > 1 and world().first:
            write_text(self.run_dir / "walk.json", json.dumps(
                [stage.to_dict() for stage in self.stages], indent=1))


def _table(model: nn.Module, bits: Mapping[str, int]) -> int | Mapping[str, int]:
    """Return bits by site once they are known to fit, before any work; one for all as a number.

    Raises:
        SpecError: a converted model, a pattern that matches nothing, impossible bits.
    """
    if not all(isinstance(b, int) for b in bits.values()):
        raise SpecError(f"bits={dict(bits)!r} must give each pattern 1 to 8, or 32")
    if set(bits) == {"*"}:
        return bits["*"]
    if any(not is_input(name) for name in staircases(model)):
        raise SpecError("bits by site are for a float model, and this one is converted",
                        fix="Leave bits out, or quantguard.restore(model) first.")
    inspect(restore(model) if staircases(model) else model, bits)
    return bits


def _name(bits: int) -> str:
    return "float" if bits == FLOAT_BITS else f"{bits} bits"
