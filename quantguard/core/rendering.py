"""Registries of the text and HTML forms of results, and small helpers for tables.

Result classes do not import the report: ``str(result)`` calls :func:`as_text`, and the report
registers its function with ``@as_text.register``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .statistics import wilson


@functools.singledispatch
def as_text(result: object) -> str:
    """Return a result as text for a terminal of any width."""
    raise TypeError(f"no text is registered for {type(result).__name__}")


@functools.singledispatch
def as_html(result: object) -> str:
    """Return a result as an HTML fragment for a notebook."""
    raise TypeError(f"no HTML is registered for {type(result).__name__}")


@functools.singledispatch
def as_page(result: object) -> str:
    """Return a result as a self-contained HTML page."""
    raise TypeError(f"no page is registered for {type(result).__name__}")


@dataclass(frozen=True)
class Cell:
    """One figure of a table: a share of images with its confidence interval.

    Attributes:
        count: number of images that count.
        n: number of all images.
    """

    count: int
    n: int

    @property
    def share(self) -> float:
        """The share, 0 to 1."""
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the share."""
        return wilson(self.count, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.1f} [{100 * low:.1f}-{100 * high:.1f}]"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned text; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
             for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def sample_text(sample: Mapping[str, Any] | None) -> str:
    """Return which images of a data set were used, as the end of a line; empty if unknown."""
    if sample is None:
        return ""
    which = "the first" if sample["seed"] is None else "a seeded sample"
    return f"; images: {which} of {sample['of']}"
