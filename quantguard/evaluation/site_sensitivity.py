"""Cost of quantizing each site, measured by making one site at a time float."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attacks.suites import listed
from ..core.errors import SpecError
from ..core.metadata import resolved
from ..core.module_utils import check_model, check_numbers, duplicate
from ..core.progress import say
from ..core.runtime import entry_point
from ..core.specs import Threat
from ..core.statistics import mcnemar
from ..nn.contexts import bypass
from ..nn.quant_activation import quantizers
from .evaluator import evaluate
from .results import Evaluation, same_images


@contextmanager
def one_float(model: nn.Module, site: str) -> Iterator[nn.Module]:
    """Make one site compute its float activation in this context, whatever other contexts say."""
    module = quantizers(model)[site]
    with bypass(module):
        module.exempt = True
        try:
            yield model
        finally:
            module.exempt = False


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Evaluations of a model as it is, and with one site at a time made float.

    Attributes:
        whole: the evaluation of the model as it is.
        sites: for each site, in the order of the model, the evaluation with that site float.
    """

    whole: Evaluation
    sites: dict[str, Evaluation]

    def cost(self, site: str) -> tuple[int, int, float]:
        """Return what making a site float adds: correct images, survivors, and a p-value.

        The p-value is McNemar's exact one, of the survivors.
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
                 f"{self.whole.robust_accuracy:.1%}; points added by making one site float "
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
    """Measure what the quantization of each site costs, in clean and in robust accuracy.

    Each site in turn computes its float activation, with unchanged weights; every row uses the same
    attacks on the same images.

    Args:
        model: a converted classifier; it is not changed.
        loader, threat, suite, images, run_dir, seed, device, progress: as
            :func:`quantguard.evaluate`.

    Raises:
        SpecError: a model without quantized activations, or as :func:`quantguard.evaluate`.
        DataError, ConversionError: as :func:`quantguard.evaluate`.
    """
    check_model(model)
    names = list(quantizers(model))
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
