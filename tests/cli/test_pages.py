"""The pages name no command and no option that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from pages import commands_of
from tqstack.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), ROOT / "open-webui/README.md", *ROOT.glob("docs/*.md")])
TQSTACK = r"(?:\.venv/bin/)?tqstack "


def named(page: Path) -> list[str]:
    """What follows `tqstack` in a page's text and in its blocks."""
    inline = re.findall(rf"`{TQSTACK}([a-z][^`]*)`", page.read_text())
    typed = [re.match(rf"{TQSTACK}(.*)", command) for command in commands_of(page)]
    return inline + [match[1] for match in typed if match]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_that_a_page_names_exists_with_its_options(page):
    for text in named(page):
        command, words = typer.main.get_command(app), text.split("#")[0].split()
        while children := getattr(command, "commands", {}):
            command = children[words.pop(0)]
            if not words:
                break
        known = {option for parameter in command.params for option in parameter.opts}
        used = {word for word in words if re.match("--?[a-z]", word)}
        assert used <= known | {"--help"}, text


def test_commands_are_found_in_the_pages():
    assert any(one.startswith("bench router") for one in named(ROOT / "README.md"))
    assert sum(len(named(page)) for page in PAGES) > 20


def test_every_block_of_the_readme_is_of_a_language_that_tests_run():
    fences = re.findall(r"^```(.*)$", (ROOT / "README.md").read_text(), re.M)
    opening, closing = fences[::2], fences[1::2]
    assert not any(closing) and opening.count("") == 1  # the diagram
    assert set(opening) == {"bash", "python", ""}


def anchors(page: Path) -> set[str]:
    """What a link may name behind a # of a page, as GitHub makes it of headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    return {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_within_the_pages_leads_somewhere(page):
    for target in re.findall(r"\]\((?!\w+:)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_file_that_contributing_names_exists():
    named = re.findall(
        r"`((?:services|tests|docs|scripts)/[\w./-]+)`", (ROOT / "CONTRIBUTING.md").read_text()
    )
    invented = [one for one in named if "NAME" not in one and not (ROOT / one).exists()]
    assert len(named) > 20 and invented == []
