"""Output of the verbs: models, reports and text, written by the main process."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..core.file_io import write_text
from .arguments import is_main_process

Writer = Callable[[Any], None]


def save_model(model: Any, target: Path, arch: str | None) -> None:
    """Write a model, with a note if the command line needs the user's code to read it."""
    from ..conversion.checkpoint import rebuilds, save
    save(model, target, arch=arch)
    if not rebuilds(target):
        click.echo(f"note: {target} contains a {type(model).__name__}, which your own code builds. "
                   f"To read it, pass --arch {shlex.quote(arch or 'package.module:factory')} or "
                   "--trust on the command line, or quantguard.load(path, model=...) in Python.",
                   err=True)


def write_json(file: Path | str, value: dict[str, Any]) -> None:
    """Write a value as JSON."""
    write_text(file, json.dumps(value, indent=1))


def show(text: str, *files: tuple[Any, Writer]) -> None:
    """Write files, then print a text, in the main process.

    Files come first, so that a closed pipe loses nothing. If one of them cannot be written, the
    others are written all the same, and the text is printed.

    Args:
        files: (path, function that writes it); a path of None is left out.
    """
    if not is_main_process():
        return
    written: list[Any] = []
    failed: Exception | None = None
    for file, write in files:
        if file is None:
            continue
        try:
            write(file)
            written.append(file)
        except Exception as error:  # a file system may raise anything for a name
            failed = failed or error
    if text:
        click.echo(text)
    for file in written:
        click.echo(f"wrote {file}")
    if failed is not None:
        raise failed


def show_comparison(result: Any, report: str | None, json_file: str | None, strict: bool,
                    *others: tuple[Any, Writer]) -> None:
    """Write and print a comparison; exit with 1 if strict and a row is not resolved."""
    show(str(result), *others, (json_file, lambda file: write_json(file, result.to_dict())),
         (report, result.save_page))
    if strict and not all(e.reliable for e in result.rows.values()):
        sys.exit(1)
