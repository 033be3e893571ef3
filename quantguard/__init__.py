"""quantguard: low-bit activations for trained classifiers, and a robustness figure to trust.

Every public name is listed in ``__all__``; each is imported when it is first used, since Foolbox,
torchvision and torch.fx take their time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import ConversionError, DataError, LoadError, QuantguardError, SpecError, WriteError
from .spec import QuantSpec, Threat

if TYPE_CHECKING:
    from . import attacks
    from .activation import QuantActivation
    from .certificate import Certificate
    from .certification import certify
    from .checkpoint import load, save
    from .contexts import backward, bypass, soften
    from .conversion import convert, inspect, restore
    from .evaluation import evaluate
    from .hardening import harden
    from .masking import Flag
    from .pipeline import Comparison, ablate, compare
    from .plan import Plan
    from .recipes import Recipe
    from .results import Evaluation
    from .sensitive import Sensitivity, sensitivity

_LAZY = {
    "QuantActivation": "activation", "backward": "contexts", "bypass": "contexts",
    "soften": "contexts", "Certificate": "certificate", "certify": "certification",
    "load": "checkpoint", "save": "checkpoint",
    "Evaluation": "results", "evaluate": "evaluation", "Flag": "masking",
    "Comparison": "pipeline", "ablate": "pipeline", "compare": "pipeline", "harden": "hardening",
    "Sensitivity": "sensitive", "sensitivity": "sensitive",
    "Recipe": "recipes", "convert": "conversion", "inspect": "conversion", "restore": "conversion",
    "Plan": "plan",
}

__all__ = [
    "Certificate", "Comparison", "ConversionError", "DataError", "Evaluation", "Flag",
    "LoadError", "Plan", "QuantActivation", "QuantSpec", "QuantguardError", "Recipe",
    "Sensitivity", "SpecError", "Threat", "WriteError", "ablate", "attacks", "backward",
    "bypass", "certify", "compare", "convert", "evaluate", "harden", "inspect", "load",
    "restore", "save", "sensitivity", "soften",
]


def __getattr__(name: str) -> Any:
    if name == "attacks":
        return importlib.import_module(".attacks", __name__)
    if name == "__version__":
        from .running import version
        return version()
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
