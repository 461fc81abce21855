"""The documentation as data: its pages, their code blocks, links and headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```[ ]*$", re.DOTALL | re.MULTILINE
)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)|!\[[^\]]*\]\((?P<image>[^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.*?) *$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, the line on which the text starts, and whether it follows another at once."""

    language: str
    text: str
    line: int
    adjoins: bool


@dataclass(frozen=True)
class Page:
    """A Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        """The path from the root of the repository."""
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        """What the file holds."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def blocks(self) -> list[Block]:
        """Every fenced block, in order."""
        found, end = [], 0
        for match in _FENCE.finditer(self.text):
            indent = match["indent"]
            body = "".join(line.removeprefix(indent) for line in match["text"].splitlines(keepends=True))
            line = self.text.count("\n", 0, match.start("text")) + 1
            found.append(Block(match["language"], body, line, not self.text[end : match.start()].strip()))
            end = match.end()
        return found

    @cached_property
    def prose(self) -> str:
        """The text without code: blocks and spans."""
        return re.sub(r"`[^`\n]*`", "`code`", _FENCE.sub("", self.text))

    @property
    def script(self) -> str:
        """All Python blocks as one program, every line where it stands in the file."""
        lines = [""] * (self.text.count("\n") + 1)
        for block in self.blocks:
            if block.language == "python":
                for i, line in enumerate(block.text.splitlines()):
                    lines[block.line - 1 + i] = line
        return "\n".join(lines)

    @property
    def shown(self) -> list[Block]:
        """What the page says that its Python blocks print: the text block right after one."""
        pairs = zip(self.blocks, self.blocks[1:], strict=False)
        return [b for a, b in pairs if (a.language, b.language) == ("python", "text") and b.adjoins]

    @property
    def commands(self) -> Iterator[tuple[int, str]]:
        """Every `$ command` of a console block, with its line."""
        for block in self.blocks:
            if block.language == "console":
                for i, line in enumerate(block.text.splitlines()):
                    if line.startswith("$ "):
                        yield block.line + i, line[2:]

    @property
    def links(self) -> Iterator[str]:
        """The targets of links and images."""
        for match in _LINK.finditer(self.prose):
            yield match["target"] or match["image"]

    @cached_property
    def anchors(self) -> set[str]:
        """What `#...` may name: the headings as mkdocs and GitHub spell them."""
        titles = _HEADING.findall(_FENCE.sub("", self.text))
        return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", t.replace("`", "")).strip().lower()) for t in titles}


def pages() -> list[Page]:
    """The README and every page of the documentation."""
    return [Page(ROOT / "README.md"), *(Page(path) for path in sorted((ROOT / "docs").rglob("*.md")))]


def follows(expected: str, printed: str) -> str | None:
    """The first expected line that is not printed, in order; None when all are. `...` stands for anything on a line."""
    rest = printed.splitlines()
    for line in expected.splitlines():
        if line.strip() in ("", "..."):
            continue
        pattern = re.compile(r"\s+".join(".*".join(map(re.escape, word.split("..."))) for word in line.split()))
        at = next((i for i, found in enumerate(rest) if pattern.fullmatch(found.strip())), None)
        if at is None:
            return line
        rest = rest[at + 1 :]
    return None
