"""The README and the docs name only what exists."""

import re
from pathlib import Path

import click
import pytest

from quantguard.cli import main as cli
from quantguard.evaluation import attack_flags, model_flags

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get on GitHub."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def dead_links(page: Path, text: str) -> list[str]:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            other = page.parent / name if name else page
            if not other.exists() or (anchor and anchor not in anchors(other)):
                dead.append(target)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_benchmarks_exist(page: Path) -> None:
    text = page.read_text()
    assert not dead_links(page, text)
    for path in re.findall(r"`(?:python )?((?:benchmarks|tests|docs|examples)/[\w./*]+)", text):
        assert list(ROOT.glob(path)), f"{page.name} names {path}"


def test_a_dead_link_is_found() -> None:
    assert dead_links(PAGES[0], "[a](docs/none.md) [b](README.md#no-such) [c](README.md)") == [
        "docs/none.md", "README.md#no-such"]


def test_the_readme_s_commands_exist() -> None:
    """Each `quantguard VERB --option` of a code block is a verb and an option of it."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    found = re.findall(r"quantguard (\w+)([^#\n&]*)", "\n".join(blocks))
    assert len(found) > 10
    for verb, rest in found:
        command = cli.main.commands[verb]
        assert isinstance(command, click.Command)
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        assert set(re.findall(r"--[\w-]+", rest)) <= known, (verb, rest)


def test_every_flag_is_explained() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    source = "".join(Path(file).read_text() for file in (attack_flags.__file__,
                                                         model_flags.__file__))
    names = re.findall(r'(?:Flag|share_flag)\(f?"([^"]+)"', source)
    assert len(names) > 10
    assert [n for n in names if n.replace("{name}", "").strip() not in page] == []
