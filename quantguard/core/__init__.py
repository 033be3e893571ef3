"""The base of all other rooms: errors, settings, files, progress, running and loading models.

Settings are in ``specs``, metadata of models in ``metadata``; ``model_calls``, ``module_utils``,
``nested_tensors`` and ``runtime`` run models; ``object_state``, ``call_recorder`` and
``forward_state`` find state in them; ``run_dir``, ``file_io``, ``progress``, ``rendering`` and
``statistics`` store and show results. ``distributed`` is for runs of several processes,
``source_location`` finds the source of a call, and ``model_loading`` reads model files. Importing
the package itself imports no torch.

To add an error, derive it from ``QuantguardError`` in ``errors``. To add a setting, write a frozen
dataclass in ``specs`` that checks its values in ``__post_init__``. To add a helper, put it into the
file of its topic; a file here imports from no other room.
"""

from .errors import (
    ConversionError,
    DataError,
    Interrupted,
    LoadError,
    QuantguardError,
    SpecError,
    WriteError,
)
from .specs import InputSpec, QuantSpec, Threat

__all__ = ["ConversionError", "DataError", "InputSpec", "Interrupted", "LoadError", "QuantSpec",
           "QuantguardError", "SpecError", "Threat", "WriteError"]
