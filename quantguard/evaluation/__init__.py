"""Evaluation: how robust a model is under a suite of attacks, and how far to trust that figure.

``evaluator`` evaluates one model, ``comparison`` several, ``site_sensitivity`` each quantized site;
``suite_runner`` runs the attacks, ``diagnostics`` raises the flags, ``report`` shows the results.

To add a check, write a function that returns a :class:`Flag` in ``attack_flags`` or
``model_flags``, call it in ``diagnostics``, and explain the flag's name in ``docs/evaluation.md``.
"""

from .comparison import Comparison, compare
from .evaluator import evaluate
from .flags import Flag
from .report import comparison_text, evaluation_text, page
from .results import Evaluation
from .site_sensitivity import Sensitivity, sensitivity

__all__ = ["Comparison", "Evaluation", "Flag", "Sensitivity", "compare", "comparison_text",
           "evaluate", "evaluation_text", "page", "sensitivity"]
