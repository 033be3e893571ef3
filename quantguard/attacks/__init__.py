"""Attacks, each a ``foolbox.attacks.Attack``, and the suites that :func:`quantguard.evaluate` runs.

:class:`FoolboxModel` wraps a model for every attack, ours and Foolbox's. White-box attacks are PGD
and APGD (``gradient_attack``) and the minimum-norm attacks; Square, NES, ZOO, HopSkipJump and
Boundary use queries only; Substitute transfers from a model trained on queries. ``suites`` combines
them, and ``bpda`` and ``step_sites`` give gradients to operations that have none.

To add an attack, write a file with a subclass of ``base.NormBallAttack`` (or of
``gradient_attack.GradientAttack``), draw its random numbers with ``noise.seed_of`` so that a result
does not depend on the batch, and list it here and in ``suites.py``.

Example:
    >>> import quantguard as qg  # doctest: +SKIP
    >>> fmodel = qg.attacks.FoolboxModel(model.eval())
    >>> raw, clipped, fooled = qg.attacks.PGD(sharpness=(2, 16))(
    ...     fmodel, images, labels, epsilons=0.1)
"""

from .apgd import APGD
from .decision_based import Boundary, HopSkipJump
from .foolbox_model import FoolboxModel
from .minimum_norm import DDN, CarliniWagner, DeepFool
from .nes import NES
from .noise import Noise as Noise
from .pgd import PGD
from .pixel_model import PixelModel as PixelModel
from .pixel_model import logits_of as logits_of
from .square import Square
from .substitute import Substitute
from .suite_entry import Entry as Entry
from .suite_entry import Suite as Suite
from .suites import build_suite as build_suite
from .zoo import ZOO

# The names with "as" above can be imported from here, too; suites and other rooms need them.
__all__ = ["APGD", "DDN", "NES", "PGD", "ZOO", "Boundary", "CarliniWagner", "DeepFool",
           "FoolboxModel", "HopSkipJump", "Square", "Substitute"]
