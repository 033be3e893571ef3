"""A run directory: the state of a fine-tune, its metrics, and what it must agree on."""

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

from .errors import LoadError, SpecError
from .files import replacing, write_text
from .world import world

try:
    import fcntl
except ImportError:  # Windows has none: two runs in one directory are the user's to avoid there
    fcntl = None  # type: ignore[assignment]

# Settings that differ because others do: the model as it is converted.
_FOLLOWS = ("weights at the start", "tensors", "batches")
_digest = functools.partial(hashlib.blake2b, digest_size=16)


@contextmanager
def locked(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Hold a run directory, which is made where there is none, against other runs.

    Of several processes of one run the first holds it for all. A record lock (``lockf``) is gone
    with its process, and no child of that inherits it, as the workers of a loader would.

    Raises:
        SpecError: another run is under way there, or it cannot be a run directory.
    """
    if path is None:
        yield
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        file = open(Path(path) / ".lock", "ab") if world().first else None  # noqa: SIM115
    except OSError as error:
        raise SpecError(f"{os.fspath(path)} cannot be a run directory",
                        why=f"{error.strerror or error}.", fix="Name another.") from error
    try:
        if world().agreed(file is not None and _taken(file)):
            raise SpecError(f"another run is under way in {os.fspath(path)}",
                            fix="Wait for its end, or use another run directory.")
        yield
    finally:
        if file is not None:
            file.close()  # the lock goes with it


def _taken(file: IO[bytes]) -> bool:
    """Lock a file, and return whether another process has; without locks nobody has."""
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # of another kind where the file system knows no locks
        return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


class RunDir:
    """Hold a run directory, or the lack of one.

    Args:
        path: None: nothing is kept.
        settings: what a run that goes on from here must agree on, as plain JSON types.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))

    def read(self, device: torch.device, extends: str | None = None) -> dict[str, Any] | None:
        """Return what was written, or None; the directory is to be ``locked``.

        Args:
            extends: a setting, a number, that may be larger than it was.

        Raises:
            SpecError: it belongs to a run of other settings.
            LoadError: it is not what was written.
        """
        if self.path is None:
            return None
        for left in self.path.glob(".training.pt.*"):  # by a process that was killed writing
            left.unlink(missing_ok=True)
        file = self.path / "training.pt"
        if not file.exists():
            return None
        _check_seal(file)
        told: dict[str, Any] = torch.load(file, weights_only=True, map_location=device)
        kept = told["settings"]
        differ = [k for k, v in self.settings.items() if kept.get(k) != v
                  and not (k == extends and v > kept[k])]
        # what follows from the others is not worth a line of its own
        differ = [k for k in differ if k not in _FOLLOWS] or differ
        different = sorted(f"{k} ({_apart(kept.get(k), self.settings[k])})" for k in differ)
        if different:
            raise SpecError(f"{self.path} holds a run of other settings",
                            why=f"Different: {', '.join(different)}.",
                            fix="Use another run directory, or delete this one.")
        return told

    def write(self, state: dict[str, Any], rows: list[dict[str, Any]],
              record: dict[str, Any]) -> None:
        """Replace what is kept: the state, and what :meth:`tell` writes.

        Raises:
            WriteError: the disk is full, say; what was kept before is kept still.
        """
        if self.path is None:
            return
        # through a file of Python's: torch's own does not say that a disk is full
        with replacing(self.path / "training.pt") as beside, open(beside, "w+b") as file:
            torch.save({"settings": self.settings, **state}, file)
            file.seek(0)
            seal = hashlib.file_digest(file, _digest).digest()
            file.write(seal)  # at the end, where torch.load does not look
        self.tell(rows, record)

    def tell(self, rows: list[dict[str, Any]], record: dict[str, Any]) -> None:
        """Write what people read: ``metrics.jsonl``, a line for each of rows, and ``run.json``.

        That has the settings that the run began with, and record.

        Raises:
            WriteError: as :meth:`write`.
        """
        if self.path is None:
            return
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_text(self.path / "run.json", json.dumps({"settings": self.settings, **record},
                                                      indent=1) + "\n")


def _check_seal(path: Path) -> None:
    """Look whether a file is what was written: torch.load takes a flipped bit for a weight.

    Raises:
        LoadError: it is not.
    """
    content, digest = memoryview(path.read_bytes()), _digest()
    digest.update(content[: -digest.digest_size])
    if digest.digest() != content[-digest.digest_size :]:
        raise _damaged(path)


def arrays(path: Path, *names: str) -> list[Any]:
    """Return arrays that np.savez has kept.

    Raises:
        LoadError: the file is damaged, or another.
    """
    try:
        with open(path, "rb") as file:  # which np.load leaves open where it fails
            found = np.load(file, allow_pickle=False)
            return [found[name] for name in names]
    except Exception as error:  # what is no such file may raise anything
        raise _damaged(path) from error


def _damaged(path: Path) -> LoadError:
    return LoadError(f"{path} is damaged", why="It is not what was written there.",
                     fix="Delete it, or use another run directory.")


def _apart(before: Any, now: Any) -> str:
    """Return two settings; of lists and tables only what the other does not have."""
    if isinstance(before, dict) and isinstance(now, dict):
        return "; ".join(f"{k} {_short(before.get(k))}, now {_short(now.get(k))}"
                         for k in sorted({*before, *now}) if before.get(k) != now.get(k))
    if isinstance(before, list) and isinstance(now, list):
        before, now = [v for v in before if v not in now], [v for v in now if v not in before]
    return f"{_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
