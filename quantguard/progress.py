"""Show how far a long run is, with an ETA: a live line in a terminal, a rare line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

# From which share of the whole a first piece of work, which may compile, foretells the rest.
_TELLING = 0.05
_LIVE_EVERY, _LOG_EVERY = 0.2, 15.0


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
        self.show = show
        self.live = show and self.stream.isatty()
        self.start = self.last = time.monotonic()
        self.width = 0
        self._skipped = 0.0
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

    def extend(self, units: float) -> None:
        """Count more units towards the total."""
        self.total += units

    def say(self, text: str) -> None:
        """Print one line of its own."""
        if self.show:
            self._clear()
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Leave one last line: how long it took."""
        if self.show:
            self._clear()
            took = duration(time.monotonic() - self.start)
            note = f"  {self.note}" if self.note else ""
            print(f"{self.title}: {took}{note}", file=self.stream, flush=True)

    def _line(self, now: float) -> str:
        share = min(self.done / self.total, 1.0)
        line = f"{self.title}: {share:4.0%}"
        begin, first = self._first or (now, 0.0)
        worked = self.done - self._skipped
        rates = [(now - begin) / (worked - first)] if worked > first else []
        if worked > 0 and (rates or first >= _TELLING * self.total):
            rates.append((now - self.start) / worked)
        if rates:
            left = max(self.total - self.done, 0) * min(rates)
            if self.deadline is not None:
                left = min(left, max(self.deadline - now, 0))
            line += f", {duration(left)} left"
        return line + (f"  {self.note}" if self.note else "")

    def _write(self, line: str) -> None:
        if self.live:
            self.stream.write("\r" + line.ljust(self.width))
            self.width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def _clear(self) -> None:
        if self.live and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.width = 0
