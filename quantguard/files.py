"""Write files so that what was there is never half gone: beside, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError, WriteError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path beside to write to; rename it to path if the block ends well.

    Raises:
        WriteError: it cannot be written; nothing is left beside, and path is as it was.
    """
    target = Path(path)
    beside = target.with_name(_beside(target))
    try:
        try:
            yield beside
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(target, error) from error
    except RuntimeError as error:  # what torch.save makes of an OSError
        if isinstance(error.__context__, OSError):
            raise unwritable(target, error.__context__) from error
        raise


def try_writing(path: str | os.PathLike[str], folder: Path | None = None) -> None:
    """Make and remove a file beside path, as ``replacing`` will, or in a folder above it.

    Raises:
        WriteError: that fails, and so will what is to be written.
    """
    beside = (folder or Path(path).parent) / _beside(Path(path))
    try:
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise unwritable(path, error) from error


def _beside(target: Path) -> str:
    return f".{target.name}.{os.getpid()}{target.suffix}"


def unwritable(path: str | os.PathLike[str], error: OSError) -> WriteError:
    """Return what to say of a path that could not be written."""
    return WriteError(f"{os.fspath(path)} cannot be written", why=f"{error.strerror or error}.",
                      fix="Make room there, or name another place.")


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
