"""One small family of exceptions: what and where, why, and what to do."""

from __future__ import annotations


class QuantguardError(Exception):
    """Report something the caller can mend.

    Args:
        what: what is wrong, and where (full module name, file, batch number).
        why: the reason, where it is not obvious from ``what``.
        fix: what to do about it.
    """

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__("\n".join(part for part in (what, why, fix) if part))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.what, self.why, self.fix)


class SpecError(QuantguardError, ValueError):
    """A setting (bits, eps, recipe, suite, pattern) that cannot be meant."""


class ConversionError(QuantguardError):
    """A model that cannot be converted, restored or measured as it is."""


class LoadError(QuantguardError):
    """A model file or arch spec that cannot be read, or may not be read safely."""


class Interrupted(QuantguardError, KeyboardInterrupt):
    """Ctrl-C during long work; what is kept and how to go on is in the message."""


class WriteError(QuantguardError, OSError):
    """A file or folder that cannot be written; what was there before is kept."""


class DataError(QuantguardError, ValueError):
    """Images or labels that do not fit the model, the threat or each other."""
