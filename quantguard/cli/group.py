"""The click group: error messages, exit codes and notes of every verb."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..core.errors import QuantguardError
from .arguments import is_main_process


class Group(click.Group):
    """Group that turns errors into one clear message, and Ctrl-C into exit code 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _notes():
                return super().invoke(ctx)
        except QuantguardError as error:
            lines = str(error).splitlines()
            click.echo("\n  ".join(["Error: " + lines[0], *lines[1:]]), err=True)
            ctx.exit(130 if isinstance(error, KeyboardInterrupt) else 1)
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)
        except OSError as error:
            parts = (error.filename, error.strerror or error)
            click.echo(": ".join(["Error", *(str(part) for part in parts if part)]), err=True)
            ctx.exit(1)


class _Notes(logging.Handler):
    """Handler that shows log records about loaded models, in the main process."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_main_process():
            click.echo(f"note: {record.getMessage()}", err=True)


@contextmanager
def _notes() -> Iterator[None]:
    log, notes = logging.getLogger("quantguard.model_loading"), _Notes()
    before = log.level, log.propagate
    log.addHandler(notes)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(notes)
        log.level, log.propagate = before
