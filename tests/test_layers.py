"""The rooms import only rooms listed above them in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "quantguard"


def listed() -> list[str]:
    """Return the rooms in the order of the architecture page."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| `\w+[./]", line)]
    names: list[str] = []
    for row in rows:
        names += re.findall(r"`(\w+)(?:\.py|/)`", row.split("|")[1])
    return names


def imported(path: Path) -> set[str]:
    """Return the rooms that a file imports, anywhere in it."""
    rooms: set[str] = set()
    depth = len(path.relative_to(PACKAGE).parts)
    tree = ast.parse(path.read_text())
    types_only = {inner for node in ast.walk(tree) if isinstance(node, ast.If)
                  and "TYPE_CHECKING" in ast.dump(node.test) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == depth and node not in types_only:
            rooms |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quantguard"):
            rooms.add((node.module or "").split(".")[1])
    return rooms


def offences(order: list[str]) -> list[str]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        if room not in order:
            found.append(f"{room} is not listed")
            continue
        found += [f"{room} imports {other}" for other in imported(path)
                  if other != room and (other not in order[: order.index(room)])]
    return found


def test_files_import_only_files_listed_above_them() -> None:
    assert not offences(listed())


def test_the_check_sees_a_wrong_order() -> None:
    assert any("rewrite imports" in text for text in offences(listed()[::-1]))


def test_measuring_rooms_never_import_rewrite() -> None:
    for room in ("evaluation.py", "masking.py", "training.py", "attacks/pgd.py", "recipes.py"):
        assert "rewrite" not in imported(PACKAGE / room)


def test_every_listed_room_exists() -> None:
    assert all((PACKAGE / f"{n}.py").exists() or (PACKAGE / n).is_dir() for n in listed())
