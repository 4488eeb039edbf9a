"""The repository's Markdown: which pages there are, their headings, links and blocks of code."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\n\Z", re.DOTALL)
_RUN_FIRST = re.compile(r"<!-- run first:\n(.*?)-->", re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        line: of the file, where its text begins.
        language: as the fence has it; empty for output and diagrams.
        why_not: why it isn't run, from a comment `<!-- not run: ... -->` on the line before it; None if it is.
    """

    line: int
    language: str
    text: str
    why_not: str | None


def kept(pattern: str) -> list[Path]:
    """The repository's files of such a name, and not those of its environments and build folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [path for name in sorted(listed.splitlines()) if (path := REPOSITORY / name).is_file()]


def blocks(text: str) -> Iterator[Block]:
    """Those of a page, in order, and first what a comment `<!-- run first: ... -->` has for all Python of it."""
    for hidden in _RUN_FIRST.finditer(text):
        yield Block(text.count("\n", 0, hidden.start(1)) + 1, "python", hidden[1], None)
    for fence in _FENCE.finditer(text):
        comment = _NOT_RUN.search(text, 0, fence.start())
        why_not = None if comment is None else " ".join(comment[1].split())
        yield Block(text.count("\n", 0, fence.start(2)) + 1, fence[1], fence[2], why_not)


def links(text: str) -> list[str]:
    """Targets of all links outside of code."""
    return _LINK.findall(re.sub(r"`[^`\n]+`", "`code`", _FENCE.sub("", text)))


def anchors(text: str) -> set[str]:
    """What links may name behind a #: headings, as GitHub makes anchors of them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        numbers = (f"{anchor}-{number}" for number in range(1, 100))
        found.add(anchor if anchor not in found else next(name for name in numbers if name not in found))
    return found
