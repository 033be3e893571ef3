"""Progress of a long run with an ETA: a live line in a terminal, occasional lines in a log."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

# The first piece of work may include compilation. The ETA uses its speed only if it is at least
# this share of the total.
_MIN_FIRST_SHARE = 0.05
_LIVE_EVERY, _LOG_EVERY = 0.2, 15.0  # seconds between lines


class _NullStream(io.TextIOBase):
    """A stream that discards text."""

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Provide a standard error inside the context if there is none; it discards text.

    A program with windows has none, and a closed one would raise an error for every warning.
    """
    stream: Any = sys.stderr
    if stream is None or getattr(stream, "closed", False):
        with contextlib.redirect_stderr(_NullStream()):
            yield
    else:
        yield


def say(text: str, stream: Any = None) -> None:
    """Print one line to a stream, by default standard error."""
    _put(sys.stderr if stream is None else stream, text + "\n")


def _put(stream: Any, text: str) -> bool:
    """Write text, and return whether that succeeded.

    A stream needs only ``write``: those of notebooks and loggers have no more methods.
    """
    if stream is None:
        return False
    try:
        stream.write(text)
        getattr(stream, "flush", _missing_method)()
    except (OSError, ValueError):  # closed, or a broken pipe, which must not end the work
        return False
    return True


def _missing_method() -> None:
    """Default for a method that a stream does not have."""


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(getattr(stream, "isatty", _missing_method)())
    except ValueError:  # closed
        return False


def duration(seconds: float) -> str:
    """Return a duration as text: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Counter of units of work, which prints how much is done and how long the rest takes.

    Args:
        title: name of the work, at the start of each line.
        total: number of units. Call :meth:`skip` for units that turn out to be unnecessary.
        show: False: print nothing.
        stream: where to print; None: standard error.
        deadline: latest end of the work, by ``time.monotonic``; None: there is no limit.
    """

    def __init__(self, title: str, total: float, show: bool = True,
                 stream: TextIO | None = None, deadline: float | None = None) -> None:
        self.title, self.total, self.done = title, max(total, 1e-9), 0.0
        self.note = ""
        self.stream = stream if stream is not None else sys.stderr
        self.show = show and self.stream is not None
        self.live = self.show and _is_terminal(self.stream)
        self.start = self.last = self._since = time.monotonic()
        self.width = 0
        self._skipped = self._warm_up = 0.0
        self.deadline = deadline
        # end and size of the first piece of work, which is slower than others if it compiles
        self._first: tuple[float, float] | None = None

    def advance(self, units: float = 1, note: str | None = None) -> None:
        """Count units as done; note: text after the figures, kept until the next note."""
        self.done += units
        self.note = self.note if note is None else note
        now = time.monotonic()
        if self._first is None and self.done > self._skipped:
            self._first = now, self.done - self._skipped
        if self.show and now - self.last >= (_LIVE_EVERY if self.live else _LOG_EVERY):
            self.last = now
            self._write(self._line(now))

    def skip(self, units: float) -> None:
        """Count units as done without work; the ETA ignores them."""
        self._skipped += units
        self.advance(units)

    def warmed_up(self, units: float) -> None:
        """Exclude the work so far from the ETA: it included preparations and compilation.

        Args:
            units: size of the next :meth:`advance`, which is excluded, too.
        """
        self._since, self._warm_up = time.monotonic(), self.done + units - self._skipped

    def extend(self, units: float) -> None:
        """Add units to the total."""
        self.total += units

    def say(self, text: str) -> None:
        """Print a message on its own line."""
        if self.show:
            self._clear()
            self._print(text + "\n")

    def close(self) -> None:
        """Print the last line: how long the work took."""
        if self.show:
            self._clear()
            took = duration(time.monotonic() - self.start)
            note = f"  {self.note}" if self.note else ""
            self._print(f"{self.title}: {took}{note}\n")

    def _line(self, now: float) -> str:
        share = min(self.done / self.total, 1.0)
        line = f"{self.title}: {share:4.0%}"
        begin, first = self._first or (now, 0.0)
        worked = self.done - self._skipped - self._warm_up
        if self._warm_up:
            begin, first = self._since, 0.0
        rates = [(now - begin) / (worked - first)] if worked > first else []
        if worked > 0 and not self._warm_up and (rates or first >= _MIN_FIRST_SHARE * self.total):
            rates.append((now - self.start) / worked)
        if rates:
            left = max(self.total - self.done, 0) * min(rates)
            if self.deadline is not None:
                left = min(left, max(self.deadline - now, 0))
            line += f", {duration(left)} left"
        return line + (f"  {self.note}" if self.note else "")

    def _write(self, line: str) -> None:
        if self.live:
            self._print("\r" + line.ljust(self.width))
            self.width = len(line)
        else:
            self._print(line + "\n")

    def _print(self, text: str) -> None:
        self.show = self.show and _put(self.stream, text)

    def _clear(self) -> None:
        if self.live and self.width:
            self._print("\r" + " " * self.width + "\r")
            self.width = 0
