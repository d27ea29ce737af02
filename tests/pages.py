"""What the documentation tells people to type."""

from __future__ import annotations

import re
from pathlib import Path


def blocks_of(page: Path, language: str) -> list[str]:
    """The code blocks of a Markdown page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def commands_of(page: Path) -> list[str]:
    """The commands of its bash blocks; one may go over several lines."""
    text = "\n".join(blocks_of(page, "bash")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]
