"""Measure robustness: the share of images that survive every attack of a suite.

Every attacked figure is an upper bound of the truth; its interval covers the sampling of images
only. No attack is believed: each adversarial is clipped to the threat again and predicted again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import masking
from .attacks import Entry, FoolboxModel, PixelModel, Suite, build_suite
from .attacks.pgd import margin, project
from .batches import check_images, check_labels, require_reiterable, snap, to_pixels, unpack
from .errors import DataError, Interrupted, SpecError
from .evidence import all_flags, are_probabilities, fidelity, padded, predict, saturated
from .files import replacing
from .progress import Progress
from .results import AttackResult, Evaluation, indices, mask_of
from .running import device_of, evaluating, frozen, seeded, to_device, usable_device
from .spec import Threat


@dataclass(frozen=True)
class Images:
    """Hold what is attacked: pixels (N, ...), labels (N,), and the model's keyword for images."""

    pixels: Tensor
    labels: Tensor
    key: str | None = None


def environment(device: torch.device) -> dict[str, str]:
    """Return the versions and the machine that a result depends on."""
    import importlib.metadata as metadata
    versions = {name: metadata.version(name) for name in ("torch", "foolbox", "numpy")}
    return {"python": platform.python_version(), **versions, "quantguard": version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores", "device": str(device),
            "threads": str(torch.get_num_threads())}


def version() -> str:
    """Return the installed version of the distribution."""
    import importlib.metadata as metadata
    try:
        return metadata.version("torch-quantguard")
    except metadata.PackageNotFoundError:
        return "not installed"


def gather(model: nn.Module, loader: Iterable[Any], threat: Threat, images: int | None) -> Images:
    """Take the first images of a loader as pixels, checked.

    Raises:
        DataError: no labels, nothing at all, pixels outside the bounds, or labels that the
            model has no class for.
    """
    require_reiterable(loader, "the loader")
    if images is not None and images < 1:
        raise SpecError(f"images={images} must be at least 1")
    device = device_of(model)
    pixels: list[Tensor] = []
    labels: list[Tensor] = []
    key: str | None = None
    taken = 0
    for number, batch in enumerate(loader):
        where = f"batch {number} of the loader"
        inputs, target = unpack(batch)
        if target is None:
            raise DataError(f"{where} has no labels", fix="Yield (images, labels).")
        key, x = image_tensor(inputs, where)
        check_labels(target, None, where)
        if len(x) != len(target):
            raise DataError(f"{where} has {len(x)} images and {len(target)} labels")
        check_images_shape(x, where)
        p = to_pixels(x.float(), threat)
        check_images(p, threat.bounds, where)
        pixels.append(snap(p, threat.bounds).clamp(*threat.bounds))
        labels.append(target)
        taken += len(x)
        if images is not None and taken >= images:
            break
    if not taken:
        raise DataError("the loader is empty", fix="Give at least one batch.")
    x, y = torch.cat(pixels)[:images], torch.cat(labels)[:images].long()
    return Images(to_device(x, device), to_device(y, device), key)


def image_tensor(inputs: Any, where: str) -> tuple[str | None, Tensor]:
    """Return the one tensor that is attacked, and the keyword it goes under.

    Raises:
        DataError: several, or none.
    """
    if isinstance(inputs, Tensor):
        return None, inputs
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    if len(tensors) != 1 or len(inputs) != 1:
        raise DataError(f"{where} holds {', '.join(map(repr, inputs))} beside the labels",
                        why="The images that an attack may change must be the model's only input.",
                        fix="Yield one image tensor, and bind other inputs into the model.")
    ((name, x),) = tensors.items()
    return name, x


def check_images_shape(x: Tensor, where: str) -> None:
    """Refuse what is no batch of images or features.

    Raises:
        DataError: an empty batch, integers, or fewer than two dimensions.
    """
    if x.dim() < 2 or not len(x):
        raise DataError(f"{where} has shape {tuple(x.shape)}", fix="Give images as (N, C, H, W).")


def batch_size(x: Tensor) -> int:
    """Return the one batch size for images of this shape."""
    return 128 if x[0].numel() <= 3 * 64 * 64 else 16


class _State:
    """Hold an evaluation under way; a run directory keeps it after every attack."""

    def __init__(self, path: Path | None, settings: dict[str, Any], images: Images,
                 correct: np.ndarray) -> None:
        self.path, self.settings = path, settings
        self.survived = correct.copy()
        self.results: list[AttackResult] = []
        # What broke an image; of one that stands, what came nearest.
        self.adversarials = images.pixels.cpu().numpy().copy()
        self.margins = np.full(len(correct), -np.inf)
        if path is not None and path.exists():
            self._read(path, len(correct))

    def _read(self, path: Path, n: int) -> None:
        with np.load(path, allow_pickle=False) as file:
            told = json.loads(str(file["state"]))
            different = sorted(k for k in {*told["settings"], *self.settings}
                               if told["settings"].get(k) != self.settings.get(k))
            if different:
                raise SpecError(f"{path.parent} holds an evaluation of other settings",
                                why=f"Different: {', '.join(different)}.",
                                fix="Use another run directory, or delete this one.")
            self.adversarials, self.margins = file["adversarials"], file["margins"]
        for row in told["results"]:
            row |= {k: mask_of(row[k], n) for k in ("attacked", "broke")}
            self.results.append(AttackResult(**row))
            self.survived &= ~self.results[-1].broke

    def add(self, result: AttackResult) -> None:
        self.results.append(result)
        self.survived &= ~result.broke
        if self.path is None:
            return
        rows = [{**vars(r), "attacked": indices(r.attacked), "broke": indices(r.broke)}
                for r in self.results]
        with replacing(self.path) as beside:
            np.savez(beside, adversarials=self.adversarials, margins=self.margins,
                     state=json.dumps({"settings": self.settings, "results": rows}))


def evaluate(model: nn.Module, loader: Iterable[Any], threat: Threat = Threat(), *,
             suite: str | Sequence[Any] = "standard", images: int | None = None,
             run_dir: str | os.PathLike[str] | None = None, seed: int = 0,
             device: str | torch.device | None = None, progress: bool = True) -> Evaluation:
    """Measure how many images survive every attack of a suite.

    Works on converted and on float models alike, and leaves no trace on them.

    Args:
        model: a classifier; what it returns is read as logits.
        loader: re-iterable of (images, labels), or dicts with ``labels``.
        threat: norm, eps and bounds in pixel units; mean and std where the loader normalises.
        suite: ``quick``, ``standard``, or a list of ``foolbox.attacks.Attack``.
        images: how many images, the loader's first; None: all.
        run_dir: keeps the state after every attack; run again, it goes on from there.
        seed: of every random start.
        device: where to run; None: where the model is.
        progress: whether to show it.

    Raises:
        DataError: images or labels that do not fit.
        ConversionError: a model that returns no logits, or NaN.
        SpecError: an unknown suite, or a run_dir of other settings.

    Example:
        >>> evaluation = evaluate(model, loader, Threat(eps=8 / 255))  # doctest: +SKIP
        >>> evaluation.robust_accuracy, evaluation.verdict  # doctest: +SKIP
    """
    before = device_of(model)
    if device is not None:
        model.to(usable_device(device))
    try:
        with evaluating(model), frozen(model), seeded(seed), _true_float32():
            return _evaluate(model, loader, threat, suite, images, run_dir, seed, progress)
    finally:
        if device is not None:
            model.to(before)


class _true_float32:
    """Hold TF32 off: its rounding is larger than what separates a survivor from the fallen."""

    def __enter__(self) -> None:
        self.before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *_: Any) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before


def _evaluate(model: nn.Module, loader: Iterable[Any], threat: Threat, suite: str | Sequence[Any],
              images: int | None, run_dir: str | os.PathLike[str] | None, seed: int,
              show: bool) -> Evaluation:
    start = time.monotonic()
    data = gather(model, loader, threat, images)
    pixel_model = PixelModel(model, threat, data.key)
    batch = batch_size(data.pixels)
    logits = predict(pixel_model, data.pixels, batch)
    if are_probabilities(logits):
        pixel_model.probabilities = True
        logits = predict(pixel_model, data.pixels, batch)
    check_labels(data.labels, logits.shape[1], "the loader")
    correct = (logits.argmax(1) == data.labels).cpu().numpy()
    chosen = build_suite(suite, threat, seed=seed, quantized=pixel_model.quantized,
                         saturated=saturated(logits, data.labels))
    digest = hashlib.blake2b(data.pixels.cpu().numpy().tobytes()
                             + data.labels.cpu().numpy().tobytes(), digest_size=16).hexdigest()
    settings = {"threat": json.loads(json.dumps(threat.to_dict())), "seed": seed,
                "suite": [e.settings() for e in chosen.every], "images": digest,
                "predictions": hashlib.blake2b(logits.cpu().numpy().tobytes(),
                                               digest_size=16).hexdigest()}
    settings = json.loads(json.dumps(settings))
    path = None
    if run_dir is not None:
        path = Path(run_dir) / "evaluation.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
    state = _State(path, settings, data, correct)
    certain = [*chosen.entries, *chosen.blind]
    bar = Progress("evaluate", sum(e.cost for e in certain) * int(correct.sum()), show)
    try:
        _Schedule(pixel_model, data, threat, batch, correct, state, bar).run(chosen)
        flags = all_flags(pixel_model, data.pixels, data.labels, threat, batch, seed, correct,
                          state.survived, state.results, len(chosen.rounds))
        faithful = fidelity(pixel_model, data.pixels, data.labels, correct, threat, batch, seed)
    except KeyboardInterrupt:
        bar.close()
        many = f"{len(certain)} attacks" + " or more" * bool(chosen.rounds)
        done = f"interrupted after {len(state.results)} of {many}"
        if path is None:
            raise Interrupted(f"{done}; nothing was kept", fix="With run_dir= (--run-dir DIR) the "
                              "next run goes on from where it stopped.") from None
        raise Interrupted(f"{done}; saved in {path.parent}",
                          fix="Run the same command again to go on.") from None
    bar.close()
    name = suite if isinstance(suite, str) else "list"
    broken = (correct & ~state.survived).reshape(-1, *[1] * (data.pixels.dim() - 1))
    adversarials = np.where(broken, state.adversarials, data.pixels.cpu().numpy())
    return Evaluation(correct, state.survived, tuple(state.results), flags, adversarials,
                      data.labels.cpu().numpy(), threat, name, seed,
                      environment(data.pixels.device), digest, time.monotonic() - start, faithful)


class _Schedule:
    """Run what is not done yet: cheap attacks first, the fallen are not attacked again."""

    def __init__(self, model: PixelModel, data: Images, threat: Threat, batch: int,
                 correct: np.ndarray, state: _State, bar: Progress) -> None:
        self.model, self.data, self.threat, self.batch = model, data, threat, batch
        self.correct, self.state, self.bar = correct, state, bar
        self.number = 0

    def run(self, suite: Suite) -> None:
        for entry in suite.entries:
            self._one(entry)
        self._escalate(suite.rounds)
        for entry in suite.blind:
            self._one(entry)

    def _one(self, entry: Entry) -> AttackResult:
        """Run the next attack, or take what a run directory holds of it."""
        state, every = self.state, int(self.correct.sum())
        if self.number == len(state.results):
            mask = self.correct if entry.everywhere else state.survived
            result = _attack(FoolboxModel(self.model, self.threat), entry, self.data, self.threat,
                             self.batch, mask, state, self.bar)
            self.bar.skip(entry.cost * (every - int(result.attacked.sum())))
            state.add(result)
        else:
            self.bar.skip(entry.cost * every)
        self.number += 1
        return state.results[self.number - 1]

    def _escalate(self, rounds: Sequence[Entry]) -> None:
        """Run round after round, until two in a row each break less than half a point."""
        idle = 0
        for entry in rounds:
            self.bar.extend(entry.cost * int(self.correct.sum()))
            broke = int(self._one(entry).broke.sum())
            idle = idle + 1 if broke < masking.PAYS * len(self.correct) else 0
            if idle == 2:
                return


def _attack(fmodel: FoolboxModel, entry: Entry, data: Images, threat: Threat, batch: int,
            mask: np.ndarray, state: _State, bar: Progress) -> AttackResult:
    """Run one attack on the images of mask, and judge what it returns."""
    import foolbox as fb
    begin = time.monotonic()
    model = fmodel.module
    queries, gradients = model.queries, model.gradients
    minimum = isinstance(entry.attack, fb.attacks.base.MinimizationAttack)
    broke, own, norms = np.zeros(len(mask), dtype=bool), 0, []
    chosen = np.flatnonzero(mask)
    for first in range(0, len(chosen), batch):
        rows = chosen[first : first + batch]
        x, size = padded(data.pixels[rows], batch)
        y, _ = padded(data.labels[rows], batch)
        criterion = fb.criteria.Misclassification(y)
        if minimum:
            raw = entry.attack.run(fmodel, x, criterion)
            # Foolbox answers "none found" with zeros.
            found = (model(raw).argmax(1) != y)[:size] & (raw != 0).flatten(1).any(1)[:size]
            own += int(found.sum())
            norms += (raw - x)[:size][found].flatten(1).norm(dim=1).tolist()
            raw = torch.where(_like(found, raw, size), raw, x)
        else:
            options = {}
            if getattr(entry.attack, "restart", False):
                near = torch.from_numpy(state.adversarials[rows]).to(x)
                options["starting_points"] = padded(near, batch)[0]
            raw = entry.attack.run(fmodel, x, criterion, epsilon=threat.eps, **options)
        raw = torch.where(raw.isfinite(), raw.detach(), x)
        trial = project(raw, x, threat.eps, threat.norm, threat.bounds)
        with torch.no_grad():
            logits = model(trial)
        # NaN would pass for class 0
        fooled = ((logits.argmax(1) != y) & logits.isfinite().all(1))[:size].cpu().numpy()
        broke[rows] = fooled
        height = margin(logits, y)[:size].cpu().numpy()
        new = state.survived[rows] & (fooled | (height > state.margins[rows]))
        state.adversarials[rows[new]] = trial[:size].cpu().numpy()[new]
        state.margins[rows[new]] = height[new]
        standing = int((state.survived & ~broke).sum())
        bar.advance(entry.cost * size, f"{entry.label}, {standing} of {len(mask)} standing")
    return AttackResult(entry.settings(), mask.copy(), broke, own if minimum else None,
                        float(np.median(norms)) if norms else None, model.queries - queries,
                        model.gradients - gradients, time.monotonic() - begin)


def _like(found: Tensor, raw: Tensor, size: int) -> Tensor:
    whole = torch.zeros(len(raw), dtype=torch.bool, device=raw.device)
    whole[:size] = found
    return whole.reshape(-1, *[1] * (raw.dim() - 1))
