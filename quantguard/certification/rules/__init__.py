"""Rules: what each operation makes of bounds, one file for each family of operators.

Each family registers its rules for both domains side by side: sound bounds (`intervals`,
`linear_bounds`) for certificates, and centers and radii (`training`) for training.

To add an operation, write a function in the file of its family that takes the operation's arguments
with `Interval` in place of tensors, and decorate it with `register_rule` (`registry`), which lists
what calls the operation and takes its training rule, or the reason why there is none.
"""

from . import activations, affine, arithmetic, pooling, quantizers, shapes
from .registry import RULES, Rule, register_rule

__all__ = ["RULES", "Rule", "activations", "affine", "arithmetic", "pooling", "quantizers",
           "register_rule", "shapes"]
