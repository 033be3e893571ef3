"""Adversarial and certified fine-tuning of converted models.

``harden`` (``hardening``) trains in stages (``bit_schedule``, ``bit_search``, ``stage_trainer``);
``ablate`` (``ablation``) compares the result with float. Each stage converts the model
(``prepare``) and runs epochs (``trainer``) of steps (``train_step``), which attack the images
(``inner_attack``) and minimise a loss (``objectives``, or ``certified`` for intervals). After each
epoch the model is validated (``validation``), and failures are repaired (``recovery``).

To add a recipe, add its defaults to ``recipe_defaults.DEFAULTS``. A new setting is a field of
``recipes.Recipe``, and a new term of the loss belongs in ``objectives.Objective``.
"""

from .ablation import ablate
from .hardening import harden, hardened
from .history import Epoch, History
from .recipes import Recipe, recipe_of
from .trainer import fit

__all__ = ["Epoch", "History", "Recipe", "ablate", "fit", "harden", "hardened", "recipe_of"]
