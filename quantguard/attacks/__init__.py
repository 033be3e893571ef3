"""Attacks, every one a ``foolbox.attacks.Attack``: what Foolbox has, bridged, and what it lacks.

Example:
    >>> import quantguard as qg  # doctest: +SKIP
    >>> fmodel = qg.attacks.FoolboxModel(model.eval())
    >>> raw, clipped, fooled = qg.attacks.PGD(twin=(2, 16))(fmodel, images, labels, epsilons=0.1)
"""

from .bridge import FoolboxModel, PixelModel, logits_of
from .noise import Noise
from .pgd import PGD
from .square import Square
from .suites import Entry, Suite, build_suite

__all__ = ["PGD", "Entry", "FoolboxModel", "Noise", "PixelModel", "Square", "Suite", "build_suite",
           "logits_of"]
