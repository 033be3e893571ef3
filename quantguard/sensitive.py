"""What the quantization of each site costs: make one float again, and measure."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .activation import staircases
from .attacks import PixelModel
from .attacks.suites import listed
from .contexts import bypass
from .errors import SpecError
from .evaluation import evaluate
from .masking import mcnemar
from .metadata import resolved
from .probing import PixelBatches, probe
from .progress import say
from .results import Evaluation, same_images
from .running import check_model, check_numbers, duplicate, entry_point, seeded
from .spec import Threat


@contextmanager
def one_float(model: nn.Module, site: str) -> Iterator[nn.Module]:
    """Make one site compute its float activation, inside the context, whatever is switched."""
    module = staircases(model)[site]
    with bypass(module):
        module.exempt = True
        try:
            yield model
        finally:
            module.exempt = False


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Hold what each site costs: the model as it is, and with that site alone made float again.

    Attributes:
        whole: the evaluation of the model as it is.
        sites: by site, in the order of the model, that with the site made float again.
    """

    whole: Evaluation
    sites: dict[str, Evaluation]

    def cost(self, site: str) -> tuple[int, int, float]:
        """Return how many images more are right, and survive, where site is float.

        The third number is McNemar's exact p-value of the survivors.
        """
        other = self.sites[site]
        gained = int((other.survived & ~self.whole.survived).sum())
        lost = int((self.whole.survived & ~other.survived).sum())
        return (int(other.correct.sum()) - int(self.whole.correct.sum()), gained - lost,
                mcnemar(gained, lost))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"whole": self.whole.to_dict(),
                "sites": {name: e.to_dict() for name, e in self.sites.items()}}

    def __str__(self) -> str:
        n, width = self.whole.images, max(map(len, ["site", *self.sites]))
        lines = [f"{n} images: clean {self.whole.clean_accuracy:.1%}, robust <= "
                 f"{self.whole.robust_accuracy:.1%}; points that one site made float again adds "
                 "(robust: differences of upper bounds; p: exact McNemar of the survivors):",
                 f"{'site':{width}}  clean    robust   p"]
        for name in sorted(self.sites, key=lambda name: -self.cost(name)[1]):
            clean, robust, p = self.cost(name)
            lines.append(f"{name:{width}}  {100 * clean / n:+6.1f}  {100 * robust / n:+6.1f}   "
                         f"{p:.2g}")
        return "\n".join(lines)


@entry_point
def sensitivity(model: nn.Module, loader: Iterable[Any], threat: Threat | None = None, *,
                suite: str | Sequence[Any] = "quick", images: int | None = None,
                run_dir: str | os.PathLike[str] | None = None, seed: int = 0,
                device: str | torch.device | None = None,
                progress: bool = True) -> Sensitivity:
    """Measure for each site what its quantization costs, clean and attacked.

    Each site in turn computes its float activation, with the weights as they are; every row meets
    the same attacks on the same images.

    Args:
        model: a converted classifier; it is not touched.
        loader, threat, suite, images, run_dir, seed, device, progress: as
            :func:`quantguard.evaluate`.

    Raises:
        SpecError: a model without staircases, or as :func:`quantguard.evaluate`.
        DataError, ConversionError: as :func:`quantguard.evaluate`.
    """
    check_model(model)
    names = list(staircases(model))
    if not names:
        raise SpecError("the model has no quantized site", fix="Convert it first.")
    check_numbers(model)
    copy = duplicate(model)
    threat = resolved(model, threat, progress)
    suite = listed(suite)
    where = None if run_dir is None else Path(run_dir)

    def measured(name: str, number: int) -> Evaluation:
        if progress:
            say(f"[{number + 1}/{len(names) + 1}] {name}")
        return evaluate(copy, loader, threat, suite=suite, images=images, seed=seed, device=device,
                        progress=progress, run_dir=None if where is None else where / name)
    whole = measured("as it is", 0)
    sites = {}
    for number, name in enumerate(names, 1):
        with one_float(copy, name):
            sites[name] = measured(name, number)
            same_images([whole, sites[name]])
    return Sensitivity(whole, sites)


def costs(model: nn.Module, val: Iterable[Any], threat: Threat, seed: int,
          unlabelled: bool = False) -> dict[str, tuple[float, float]]:
    """Return by site what making it float gains, clean and attacked, by the probe of training.

    Args:
        unlabelled: whether images may come without a label; these are left out.
    """
    pixel_model = PixelModel(model, threat)
    batches = PixelBatches(pixel_model, threat, unlabelled)

    def probed() -> tuple[float, float]:
        with seeded(seed):
            clean, attacked, _ = probe(pixel_model, val, batches, threat, True, seed)
        return clean or 0.0, attacked or 0.0
    whole, found = probed(), {}
    for name in staircases(model):
        with one_float(model, name):
            clean, attacked = probed()
        found[name] = clean - whole[0], attacked - whole[1]
    return found
