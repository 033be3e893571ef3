"""Show how far a long run is, with an ETA: a live line in a terminal, a rare line elsewhere."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

# From which share of the whole a first piece of work, which may compile, foretells the rest.
_TELLING = 0.05
_LIVE_EVERY, _LOG_EVERY = 0.2, 15.0


class _Nowhere(io.TextIOBase):
    """Take text and lose it."""

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Put up a standard error that loses text, inside the context, where there is none.

    A windowed program has none, and who has closed it would get an error for every warning.
    """
    stream: Any = sys.stderr
    if stream is None or getattr(stream, "closed", False):
        with contextlib.redirect_stderr(_Nowhere()):
            yield
    else:
        yield


def say(text: str, stream: Any = None) -> None:
    """Print one line; stream: where to, standard error by default."""
    _put(sys.stderr if stream is None else stream, text + "\n")


def _put(stream: Any, text: str) -> bool:
    """Write text, and return whether that could be done.

    All that is asked of a stream is ``write``: a notebook's or a logger's has no more.
    """
    if stream is None:
        return False
    try:
        stream.write(text)
        getattr(stream, "flush", _nothing)()
    except (OSError, ValueError):  # closed, or its reader is gone: the work is not for that
        return False
    return True


def _nothing() -> None:
    """Stand for a method that a stream does not have."""


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(getattr(stream, "isatty", _nothing)())
    except ValueError:  # closed
        return False


def duration(seconds: float) -> str:
    """Return seconds as people say them: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Count units of work towards a total.

    Args:
        title: what is being done.
        total: number of units; more may be found to be unnecessary, then call :meth:`skip`.
        show: False is silent.
        stream: where to; None: standard error.
        deadline: when it ends at the latest, by ``time.monotonic``; None: when all is done.
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
        # when the first piece of work was done, and how much that was: it may compile, and says
        # nothing about the speed of the others
        self._first: tuple[float, float] | None = None

    def advance(self, units: float = 1, note: str | None = None) -> None:
        """Count units as done; note is what to say beside them."""
        self.done += units
        self.note = self.note if note is None else note
        now = time.monotonic()
        if self._first is None and self.done > self._skipped:
            self._first = now, self.done - self._skipped
        if self.show and now - self.last >= (_LIVE_EVERY if self.live else _LOG_EVERY):
            self.last = now
            self._write(self._line(now))

    def skip(self, units: float) -> None:
        """Count units as not needed: they say nothing about speed."""
        self._skipped += units
        self.advance(units)

    def warmed_up(self, units: float) -> None:
        """Leave what was done so far out of the speed, and units that :meth:`advance` counts next.

        They waited for preparations, and for compilers.
        """
        self._since, self._warm_up = time.monotonic(), self.done + units - self._skipped

    def extend(self, units: float) -> None:
        """Count more units towards the total."""
        self.total += units

    def say(self, text: str) -> None:
        """Print one line of its own."""
        if self.show:
            self._clear()
            self._print(text + "\n")

    def close(self) -> None:
        """Leave one last line: how long it took."""
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
        if worked > 0 and not self._warm_up and (rates or first >= _TELLING * self.total):
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
