"""Retired words and phrases stay out of names and prose; docs/glossary.md has the current terms.

A word is retired by adding it to ``NAMES`` or ``PHRASES``. The glossary and the changelog may use
all of them.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# As whole identifiers. An attribute may be called walk: os.walk, ast.walk.
NAMES = {"anew", "climb", "climbed", "climbs", "crafting", "eaten", "eats", "entrance", "fallen",
         "fewchannels", "foreign", "nearness", "staircases", "told", "twin", "twins", "walk",
         "world"}
# Anywhere in prose, in any case and across line breaks.
PHRASES = (
    "drawn anew", "give the folder that has it", "goes back to where it was well", "goes on where",
    "has none to give", "hold everything still", "holds a run of other settings",
    "how to have it again", "in which order it comes", "intervals that fall on one step",
    "is told from", "model eats", "softened twin", "stand beside the module's own",
    "stands beside", "stands on the input", "swallows what eps moves", "that nobody can take away",
    "the fallen", "the one is kept that", "the twin", "which eats", "would not be looked at")
# A docstring says what a thing is or does.
OPENINGS = ("Hold ",)

PACKAGE = ROOT / "quantguard"
CODE = {folder.relative_to(ROOT).as_posix(): sorted(folder.rglob("*.py")) for folder in
        (*sorted(f.parent for f in PACKAGE.glob("*/__init__.py")), ROOT / "tests",
         ROOT / "benchmarks")} | {"quantguard": sorted(PACKAGE.glob("*.py"))}
PAGES = [ROOT / "README.md",
         *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.name != "glossary.md"),
         *sorted((ROOT / "examples").rglob("*.ipynb"))]


def retired_names(path: Path) -> list[str]:
    """Return the retired identifiers of a Python file, each with its line."""
    before, found = "", []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        attribute = token.string == "walk" and before == "."
        if token.type == tokenize.NAME and token.string in NAMES and not attribute:
            found.append(f"{path.name}:{token.start[0]}: {token.string}")
        before = token.string
    return found


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each string, docstrings and f-strings among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}"
                                       for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text of each block of comments."""
    lines: list[str] = []
    start = last = -1
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:
                yield start, " ".join(lines)
                start, lines = token.start[0], []
            last = token.start[0]
            lines.append(token.string.lstrip("# "))
    yield start, " ".join(lines)


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the texts that a reader sees, each with its first line (a notebook's cell number)."""
    text = path.read_text()
    if path.suffix == ".py":
        yield from comments(text)
        yield from strings(ast.parse(text))
    elif path.suffix == ".ipynb":
        for number, cell in enumerate(json.loads(text)["cells"]):
            yield number, re.sub(r"^\s*# ", "", "".join(cell["source"]), flags=re.MULTILINE)
    else:
        line = 1
        for paragraph in text.split("\n\n"):
            yield line, paragraph
            line += paragraph.count("\n") + 2


def retired_phrases(path: Path) -> list[str]:
    """Return the retired phrases of a file's prose, each with the line where its text begins."""
    found = {(line, phrase) for line, text in prose(path) for phrase in PHRASES
             if re.search(rf"\b{re.escape(phrase)}\b", " ".join(text.split()).lower())}
    return [f"{path.name}:{line}: {phrase}" for line, phrase in sorted(found)]


def retired_openings(path: Path) -> list[str]:
    """Return the docstrings of a Python file that do not say what a thing is or does."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [f"{path.name}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}"
            for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)
            for text in [ast.get_docstring(node) or ""] if text.startswith(OPENINGS)]


@pytest.mark.parametrize("folder", CODE)
def test_names_are_the_field_s(folder: str) -> None:
    assert [found for path in CODE[folder] for found in retired_names(path)] == []


@pytest.mark.parametrize("folder", [f for f in CODE if f.startswith("quantguard")])
def test_prose_of_code_is_plain(folder: str) -> None:
    assert [found for path in CODE[folder] for found in retired_phrases(path)] == []


@pytest.mark.parametrize("folder", CODE)
def test_docstrings_say_what_a_thing_is(folder: str) -> None:
    assert [found for path in CODE[folder] for found in retired_openings(path)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_pages_are_plain(page: Path) -> None:
    assert retired_phrases(page) == []


def test_retired_words_are_found(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text('''"""Hold one check."""
import os
for folder in os.walk("."):
    twin = walk(folder, keep="the twins")  # weights are drawn
    # anew here
raise ValueError(f"{twin} is told "
                 "from the others")
''')
    assert retired_names(broken)[:2] == ["broken.py:4: twin", "broken.py:4: walk"]
    assert retired_phrases(broken) == ["broken.py:4: drawn anew", "broken.py:6: is told from"]
    assert retired_openings(broken) == ["broken.py:1: Hold one check."]
    page, notebook = tmp_path / "page.md", tmp_path / "notebook.ipynb"
    page.write_text("# Title\n\nAttacks climb\nthe softened\ntwin.\n")
    assert retired_phrases(page) == ["page.md:3: softened twin"]
    notebook.write_text(json.dumps({"cells": [{"source": ["# what the\n", "# fallen do\n"]}]}))
    assert retired_phrases(notebook) == ["notebook.ipynb:0: the fallen"]


def test_plain_words_are_not_found(tmp_path: Path) -> None:
    plain = tmp_path / "plain.py"
    plain.write_text('''"""Result of one check."""
import ast
twins_of = [node for node in ast.walk(tree)]  # softened models
print("Twin peaks", dict(keep=1))
''')
    assert retired_names(plain) == retired_phrases(plain) == retired_openings(plain) == []
