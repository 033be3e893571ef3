"""Import Foolbox, also on a machine without git."""

from __future__ import annotations

import os

_before = os.environ.get("GIT_PYTHON_REFRESH")
# Foolbox imports GitPython, which raises where no git is found unless told to be quiet.
os.environ["GIT_PYTHON_REFRESH"] = "quiet"
try:
    import foolbox as fb
finally:
    if _before is None:
        del os.environ["GIT_PYTHON_REFRESH"]
    else:
        os.environ["GIT_PYTHON_REFRESH"] = _before

__all__ = ["fb"]
