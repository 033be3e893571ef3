"""Sound bounds of what a model computes on all images that a threat allows."""

from .boxes import Box
from .branching import divided
from .flat import Flat, flattened
from .propagation import around, check_faithful, margins, propagate

__all__ = ["Box", "Flat", "around", "check_faithful", "divided", "flattened", "margins",
           "propagate"]
