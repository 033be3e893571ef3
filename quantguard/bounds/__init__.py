"""Sound bounds of what a model computes on all images that a threat allows."""

from .boxes import Box
from .flat import Flat, flattened
from .propagation import around, margins, propagate

__all__ = ["Box", "Flat", "around", "flattened", "margins", "propagate"]
