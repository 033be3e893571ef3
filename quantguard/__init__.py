"""quantguard: low-bit activations for trained classifiers, and a robustness figure to trust.

Every public name is listed in ``__all__``; each is imported when it is first used, since Foolbox,
torchvision and torch.fx take their time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .core.errors import (
    ConversionError,
    DataError,
    LoadError,
    QuantguardError,
    SpecError,
    WriteError,
)
from .core.specs import QuantSpec, Threat

if TYPE_CHECKING:
    from . import attacks
    from .certification.certificate import Certificate
    from .certification.certifier import certify
    from .conversion.checkpoint import load, save
    from .conversion.converter import convert, inspect, restore
    from .conversion.plan import Plan
    from .evaluation.comparison import Comparison, compare
    from .evaluation.evaluator import evaluate
    from .evaluation.flags import Flag
    from .evaluation.results import Evaluation
    from .evaluation.site_sensitivity import Sensitivity, sensitivity
    from .nn.contexts import backward, bypass, soften
    from .nn.quant_activation import QuantActivation
    from .training.ablation import ablate
    from .training.hardening import harden
    from .training.recipes import Recipe

_LAZY = {
    "QuantActivation": "nn.quant_activation",
    "backward": "nn.contexts",
    "bypass": "nn.contexts",
    "soften": "nn.contexts",
    "Certificate": "certification.certificate",
    "certify": "certification.certifier",
    "load": "conversion.checkpoint",
    "save": "conversion.checkpoint",
    "Evaluation": "evaluation.results",
    "evaluate": "evaluation.evaluator",
    "Flag": "evaluation.flags",
    "Comparison": "evaluation.comparison",
    "ablate": "training.ablation",
    "compare": "evaluation.comparison",
    "harden": "training.hardening",
    "Sensitivity": "evaluation.site_sensitivity",
    "sensitivity": "evaluation.site_sensitivity",
    "Recipe": "training.recipes",
    "convert": "conversion.converter",
    "inspect": "conversion.converter",
    "restore": "conversion.converter",
    "Plan": "conversion.plan",
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
        from .core.runtime import version
        return version()
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
