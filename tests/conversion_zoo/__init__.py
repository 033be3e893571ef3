"""Zoo of models that are hard to convert, by family, and the checks they must pass.

To add a model, add a class and an entry of ``CASES`` to the module of its family. A case lists the
activations that are converted, and those that are excluded with the reason.
"""
