"""Conversion of a float model to quantized activations, and the .qg file format.

``sites`` finds every call of an activation, in graphs (``fx_tracer``, ``activation_calls``) or by
running the model (``runtime_discovery``). ``plan`` gives each site its bits, ``apply_plan`` puts
the quantizers in place, ``calibration`` sets their thresholds, and ``audit`` compares the result
with the float model. ``converter`` does all of this; ``checkpoint`` saves and loads models.

To add an activation, add a row to the table in ``nn/activation_kinds.py``. To recognise a new form
of call, extend ``activation_calls`` for graphs and ``runtime_recorder`` for forwards that cannot be
traced, and add a model with that form to ``tests/conversion_zoo``.
"""

from .checkpoint import load, open_model, save
from .converter import (
    Conversion,
    conversion_of,
    convert,
    inspect,
    restore,
    with_input_quantizer,
)
from .example_input import find_example
from .plan import Plan, Site

__all__ = ["Conversion", "Plan", "Site", "conversion_of", "convert", "find_example", "inspect",
           "load", "open_model", "restore", "save", "with_input_quantizer"]
