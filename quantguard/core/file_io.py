"""Write files atomically (to a temporary file that is then renamed), and read JSON and masks."""

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
    """Yield a temporary path in the same folder; rename it to path if the block succeeds.

    Raises:
        WriteError: it cannot be written. The temporary file is removed, and path is unchanged.
    """
    target = Path(path)
    temporary = target.with_name(_temporary_name(target))
    try:
        try:
            yield temporary
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(target, error) from error
    except RuntimeError as error:  # torch.save turns an OSError into one
        if isinstance(error.__context__, OSError):
            raise unwritable(target, error.__context__) from error
        raise


def try_writing(path: str | os.PathLike[str], folder: Path | None = None) -> None:
    """Create and remove a temporary file, to find out early whether path can be written.

    Args:
        folder: where to try; None: the folder of path, which ``replacing`` uses.

    Raises:
        WriteError: it cannot be written.
    """
    temporary = (folder or Path(path).parent) / _temporary_name(Path(path))
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise unwritable(path, error) from error


def _temporary_name(target: Path) -> str:
    return f".{target.name}.{os.getpid()}{target.suffix}"


def unwritable(path: str | os.PathLike[str], error: OSError) -> WriteError:
    """Return the error for a path that could not be written."""
    return WriteError(f"{os.fspath(path)} cannot be written", why=f"{error.strerror or error}.",
                      fix="Make room there, or name another place.")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file does not exist or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON", why=str(error)) from None


def indices(mask: np.ndarray) -> list[int]:
    """Return the positions at which a mask is true."""
    return [int(i) for i in np.flatnonzero(mask)]


def mask_of(positions: Sequence[int], n: int) -> np.ndarray:
    """Return a mask of length n that is true at the given positions."""
    mask = np.zeros(n, dtype=bool)
    mask[list(positions)] = True
    return mask
