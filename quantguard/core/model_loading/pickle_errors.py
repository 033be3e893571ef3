"""The errors of reading a pickle: damaged, refused, or not written by torch.save."""

from __future__ import annotations

import pickletools
from typing import BinaryIO

from ..errors import LoadError


def unreadable(where: str, error: BaseException) -> LoadError:
    """Return the error for a damaged file.

    Args:
        where: name of the file.
        error: what the reader raised.
    """
    reason = str(error).strip().partition("\n")[0]
    return LoadError(f"{where} cannot be read: it is damaged or was not written by torch.save",
                     why=f"{type(error).__name__}: {reason}" if reason else type(error).__name__,
                     fix="Copy it again, or write it again: torch.save(model.state_dict(), FILE).")


def refusal(where: str, names: list[str]) -> LoadError:
    """Return the error for a file whose pickle names globals outside of the allow-list."""
    compiled = any(name.startswith("torch._dynamo.") for name in names)
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return LoadError(f"{where} is not loaded: it asks for {shown}",
                     why="A pickle can run code through the names in it; only modules of torch.nn, "
                         "torchvision and timm are considered harmless. Nothing was run.",
                     fix=("It is a torch.compile wrapper: save its _orig_mod. " if compiled else "")
                         + "Name its model with --arch to read only the weights; if you trust the "
                         "file, use --trust (trust=True).")


def plain_pickle(file: BinaryIO, where: str) -> LoadError:
    """Return the error for a pickle that torch.save did not write."""
    try:
        names = [str(a).replace(" ", ".") for op, a, _ in pickletools.genops(file)
                 if op.name == "GLOBAL"]
    except Exception as error:  # a damaged file may raise anything
        return unreadable(where, error)
    asked = f" It asks for {', '.join(dict.fromkeys(names[:3]))}." if names else ""
    return LoadError(f"{where} was written by pickle, not by torch.save",
                     why=f"A pickle runs the functions it names. Nothing was run.{asked}",
                     fix="Name its model with --arch to read only the weights; or write it again: "
                         "torch.save(model.state_dict(), FILE). If you trust the file, use "
                         "--trust (trust=True).")


def old_format(where: str) -> LoadError:
    """Return the error for a whole model in the file format of torch before 1.6."""
    return LoadError(f"{where} is a whole model in torch's old file format",
                     why="Only weights can be read safely from this format.",
                     fix="Name its model with --arch to read them; or save it again with torch "
                         "1.6 or later, or use --trust (trust=True) if you trust the file.")
