"""A run directory: the saved state of a fine-tune, its metrics and its settings."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from .distributed import distributed
from .errors import LoadError, SpecError
from .file_io import replacing, write_text

try:
    import fcntl
except ImportError:  # Windows has no such locks: the user has to avoid two runs in a directory
    fcntl = None  # type: ignore[assignment]

# Settings that follow from others: a change of those changes the converted model, too.
_DERIVED = ("weights at the start", "tensors", "batches")
_digest = functools.partial(hashlib.blake2b, digest_size=16)


@contextmanager
def locked(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Lock a run directory inside the context, and create it if it does not exist.

    The main process holds the lock for all processes of a distributed run. A record lock
    (``lockf``) ends with its process, and is not inherited by children such as loader workers.

    Raises:
        SpecError: another run is under way there, or the directory cannot be used.
    """
    if path is None:
        yield
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        file = open(Path(path) / ".lock", "ab") if distributed().is_main else None  # noqa: SIM115
    except OSError as error:
        raise SpecError(f"{os.fspath(path)} cannot be a run directory",
                        why=f"{error.strerror or error}.", fix="Name another.") from error
    try:
        if distributed().agreed(file is not None and _is_locked(file)):
            raise SpecError(f"another run is under way in {os.fspath(path)}",
                            fix="Wait for its end, or use another run directory.")
        yield
    finally:
        if file is not None:
            file.close()  # releases the lock


def _is_locked(file: IO[bytes]) -> bool:
    """Lock a file, and return whether another process has locked it before."""
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # other numbers: the file system does not support locks
        return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


class RunDir:
    """Reads and writes a run directory.

    Args:
        path: the directory; None: nothing is read or written.
        settings: the settings of the run as plain JSON types; a run that resumes from the
            directory must have the same ones.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))

    def read(self, device: torch.device, extends: str | None = None) -> dict[str, Any] | None:
        """Return the saved state, or None if there is none; call it inside ``locked``.

        Args:
            extends: name of a number among the settings that may be larger than before.

        Raises:
            SpecError: the directory belongs to a run with other settings.
            LoadError: the file is damaged.
        """
        if self.path is None:
            return None
        for partial in self.path.glob(".training.pt.*"):  # from a process killed while writing
            partial.unlink(missing_ok=True)
        file = self.path / "training.pt"
        if not file.exists():
            return None
        _check_checksum(file)
        state: dict[str, Any] = torch.load(file, weights_only=True, map_location=device)
        saved = state["settings"]
        differ = [k for k, v in self.settings.items() if saved.get(k) != v
                  and not (k == extends and v > saved[k])]
        # derived settings are only worth a line if nothing else differs
        differ = [k for k in differ if k not in _DERIVED] or differ
        different = sorted(f"{k} ({_difference(saved.get(k), self.settings[k])})" for k in differ)
        if different:
            raise SpecError(f"{self.path} belongs to a run with other settings",
                            why=f"Different: {', '.join(different)}.",
                            fix="Use another run directory, or delete this one.")
        return state

    def write(self, state: dict[str, Any], rows: list[dict[str, Any]],
              record: dict[str, Any]) -> None:
        """Replace the saved state, and the files that :meth:`tell` writes.

        Raises:
            WriteError: it cannot be written, for example on a full disk. The older files are
                unchanged.
        """
        if self.path is None:
            return
        # a Python file, because torch's own writer does not report a full disk
        with replacing(self.path / "training.pt") as temporary, open(temporary, "w+b") as file:
            torch.save({"settings": self.settings, **state}, file)
            file.seek(0)
            checksum = hashlib.file_digest(file, _digest).digest()
            file.write(checksum)  # torch.load ignores bytes at the end
        self.tell(rows, record)

    def tell(self, rows: list[dict[str, Any]], record: dict[str, Any]) -> None:
        """Write the readable files: ``metrics.jsonl``, one line a row, and ``run.json``.

        Args:
            rows: the metrics.
            record: entries of ``run.json`` beside the settings of the run.

        Raises:
            WriteError: as in :meth:`write`.
        """
        if self.path is None:
            return
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_text(self.path / "run.json", json.dumps({"settings": self.settings, **record},
                                                      indent=1) + "\n")


def _check_checksum(path: Path) -> None:
    """Check that a file is intact; torch.load does not notice a flipped bit of a weight.

    Raises:
        LoadError: it is damaged.
    """
    content, digest = memoryview(path.read_bytes()), _digest()
    digest.update(content[: -digest.digest_size])
    if digest.digest() != content[-digest.digest_size :]:
        raise _damaged(path)


def arrays(path: Path, *names: str) -> list[Any]:
    """Return arrays from a file of np.savez.

    Raises:
        LoadError: the file is damaged, or has other content.
    """
    try:
        with open(path, "rb") as file:  # np.load leaves a file open if it fails
            found = np.load(file, allow_pickle=False)
            return [found[name] for name in names]
    except Exception as error:  # other content may raise anything
        raise _damaged(path) from error


def _damaged(path: Path) -> LoadError:
    return LoadError(f"{path} is damaged", why="Its content has changed since it was written.",
                     fix="Delete it, or use another run directory.")


def _difference(before: Any, now: Any) -> str:
    """Return two values of a setting as text; of lists and dicts only the entries that differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        return "; ".join(f"{k} {_short(before.get(k))}, now {_short(now.get(k))}"
                         for k in sorted({*before, *now}) if before.get(k) != now.get(k))
    if isinstance(before, list) and isinstance(now, list):
        before, now = [v for v in before if v not in now], [v for v in now if v not in before]
    return f"{_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
