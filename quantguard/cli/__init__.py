"""The command line ``quantguard``, and the demo.

``main`` has the group; the verbs are in ``conversion_commands``, ``training_commands`` and
``evaluation_commands``. ``options`` has the options that several verbs share, ``arguments`` turns
their values into the library's arguments, and ``output`` writes results.

To add a verb, write a click command in the file of its group and add it in ``main``. Import torch
and the library inside the function, so that ``quantguard --help`` stays fast.
"""

__all__: list[str] = []
