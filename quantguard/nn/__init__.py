"""Modules and contexts that run inside a converted model.

``quant_activation`` has the one module that conversion adds, ``input_quantizer`` its form for the
input, ``contexts`` the switches (float, surrogate gradient, softened), and ``functional`` the
quantizer as a function. ``activation_kinds`` and ``numeric_match`` tell which calls are
activations. ``pool_reordering``, ``memory_format`` and ``conv_input_grad`` make attacks faster
without changing what a model computes; ``threshold_margin`` is a training penalty.

To add an activation: add a row to ``activation_kinds._KINDS``, and where models also write it out
as arithmetic, to ``activation_grid``. To add a context: change fields of ``QuantizerState`` by
``contexts.switched``.
"""

from .contexts import at_bits, backward, bypass, listening, observing, soften
from .input_quantizer import InputQuantizer
from .pool_reordering import pools_first
from .quant_activation import QuantActivation, quantizers

__all__ = ["InputQuantizer", "QuantActivation", "at_bits", "backward", "bypass", "listening",
           "observing", "pools_first", "quantizers", "soften"]
