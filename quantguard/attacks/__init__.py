"""Attacks, every one a ``foolbox.attacks.Attack``: what Foolbox has, bridged, and what it lacks.

Example:
    >>> import quantguard as qg  # doctest: +SKIP
    >>> fmodel = qg.attacks.FoolboxModel(model.eval())
    >>> raw, clipped, fooled = qg.attacks.PGD(twin=(2, 16))(fmodel, images, labels, epsilons=0.1)
"""

from .apgd import APGD
from .bridge import FoolboxModel, PixelModel, logits_of
from .bridged import DDN, Boundary, CarliniWagner, DeepFool, HopSkipJump
from .nes import NES
from .noise import Noise
from .pgd import PGD
from .square import Square
from .substitute import Substitute
from .suites import Entry, Suite, build_suite
from .zoo import ZOO

__all__ = ["APGD", "DDN", "NES", "PGD", "ZOO", "Boundary", "CarliniWagner", "DeepFool", "Entry",
           "FoolboxModel", "HopSkipJump", "Noise", "PixelModel", "Square", "Substitute", "Suite",
           "build_suite", "logits_of"]
