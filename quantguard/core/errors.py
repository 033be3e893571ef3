"""The exceptions of this package. Each message says what is wrong, why, and what to do."""

from __future__ import annotations


class QuantguardError(Exception):
    """Base class of all errors that the caller can correct.

    Args:
        what: the problem and its place (full module name, file, batch number).
        why: the reason, where ``what`` does not make it obvious.
        fix: what to do about it.
    """

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__("\n".join(part for part in (what, why, fix) if part))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.what, self.why, self.fix)


class SpecError(QuantguardError, ValueError):
    """An invalid setting (bits, eps, recipe, suite, pattern)."""


class ConversionError(QuantguardError):
    """A model that cannot be converted, restored, trained or measured as it is."""


class LoadError(QuantguardError):
    """A model file or arch spec that cannot be read, or not without running code in it."""


class Interrupted(QuantguardError, KeyboardInterrupt):
    """Ctrl-C during long work. The message names the saved files and how to resume."""


class WriteError(QuantguardError, OSError):
    """A file or folder that cannot be written; an older file there is unchanged."""


class DataError(QuantguardError, ValueError):
    """Images or labels that do not match the model, the threat or each other."""
