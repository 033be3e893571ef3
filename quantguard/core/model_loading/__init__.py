"""Loading a model from a file or an arch spec, without running code from the file.

``load_model`` has the entry, the function of that name. ``model_spec`` parses MODEL;
``architectures`` and ``transformers_models`` build untrained models; ``safe_pickle`` reads files,
as far as ``allow_list`` and ``pickle_calls`` permit; ``weights_only`` reads the weights of other
files; ``state_dicts`` finds weights and fits their names to a model. The package itself imports no
torch.

To add a library of models, add its prefix to ``LIBRARIES`` in ``model_spec``, a function that
builds a model by its name to ``architectures``, and its packages to ``allow_list``.
"""

from .model_spec import ARCH_HELP, MODEL_HELP, is_arch_spec

__all__ = ["ARCH_HELP", "MODEL_HELP", "is_arch_spec"]
