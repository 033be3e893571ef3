"""Write files so that what was there is never half gone: beside, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path beside to write to; rename it to path if the block ends well."""
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}{target.suffix}")
    try:
        yield beside
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        DataError: no such file, or no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON", why=str(error)) from None


def indices(mask: np.ndarray) -> list[int]:
    """Return the positions of a mask."""
    return [int(i) for i in np.flatnonzero(mask)]


def mask_of(positions: Sequence[int], n: int) -> np.ndarray:
    """Return a mask of length n from positions."""
    mask = np.zeros(n, dtype=bool)
    mask[list(positions)] = True
    return mask
