"""The rooms import only their own files and rooms below them, and never in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "quantguard"
# From below. A room imports from itself and from those before it.
ROOMS = ["core", "nn", "data", "attacks", "conversion", "certification", "evaluation",
         "deployment", "training", "cli"]
# Rooms beside each other: neither knows the other.
APART = [("attacks", "conversion")]


def files(package: Path = PACKAGE) -> dict[str, Path]:
    """Return every file of the package by its dotted name."""
    found = {}
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        found[name.removesuffix("__init__").rstrip(".")] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> set[tuple[str, str]]:
    """Return (file, name) of what a file imports of the package, under TYPE_CHECKING, too.

    The name is empty where a whole file is imported.
    """
    found = set()
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = [part for part in here if part][: len(here) - node.level + 1]
                module = ".".join([*base, *([module] if module else [])])
            elif module.split(".")[0] == "quantguard":
                module = module.removeprefix("quantguard").lstrip(".")
            else:
                continue
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                found.add((inner, "") if inner in known else (module, alias.name))
        elif isinstance(node, ast.Import):
            found |= {(alias.name.removeprefix("quantguard."), "") for alias in node.names
                      if alias.name.startswith("quantguard.")}
    return found


def offences(package: Path = PACKAGE, rooms: list[str] = ROOMS) -> list[str]:
    """Return what is wrong, a line each."""
    found, known = [], files(package)
    for name, path in sorted(known.items()):
        room = name.split(".")[0]
        if room in ("", "__main__"):
            continue
        if room not in rooms:
            found.append(f"{name} is in no room")
            continue
        for target, what in imports(name, path, set(known)):
            other = target.split(".")[0]
            if other not in rooms:
                found.append(f"{name} imports {target or 'quantguard'}")
            elif rooms.index(other) > rooms.index(room) or any(
                    {room, other} == set(pair) for pair in APART):
                found.append(f"{name} imports {target}, which lies above it")
            if other != room and what.startswith("_"):
                found.append(f"{name} imports {target}.{what}, which is private")
    return found


def circles(package: Path = PACKAGE) -> list[str]:
    """Return files that import each other, at whatever distance."""
    known = files(package)
    edges = {name: {target for target, _ in imports(name, path, set(known)) if target in known}
             for name, path in known.items() if name not in ("", "__main__")}
    for name in edges:
        edges[name] -= {""}
    while edges:  # take away what imports nothing that is left
        free = {name for name, targets in edges.items() if not targets & set(edges)}
        if not free:
            break
        edges = {name: targets for name, targets in edges.items() if name not in free}
    return sorted(edges)


def test_a_room_imports_from_itself_and_from_below() -> None:
    assert not offences()


def test_nothing_imports_in_a_circle() -> None:
    assert not circles()


def test_the_checks_see_what_is_wrong(tmp_path: Path) -> None:
    for name, text in {"core/a.py": "from ..nn.b import c\nfrom .d import e",
                       "core/d.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
                                    "    from . import a",
                       "nn/b.py": "from ..core.d import _hidden\nimport quantguard.cli.f",
                       "cli/f.py": "", "odd/g.py": "", "attacks/h.py": "",
                       "conversion/i.py": "from quantguard.attacks.h import j"}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert sorted(offences(tmp_path)) == [
        "conversion.i imports attacks.h, which lies above it",
        "core.a imports nn.b, which lies above it",
        "nn.b imports cli.f, which lies above it",
        "nn.b imports core.d._hidden, which is private",
        "odd.g is in no room"]
    assert circles(tmp_path) == ["core.a", "core.d", "nn.b"]


def test_every_room_says_what_is_in_it() -> None:
    for room in ROOMS:
        tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
        assert ast.get_docstring(tree), room
