"""Real long text that is found on this machine, for work without a network: the corpus `"system"`.

Always there: the source files of Python's standard library, and the prose of its help topics. Where Debian's packages
are installed: the King James Bible (`bible-kjv`), the Anarchist FAQ (`anarchism`) and the Jargon File
(`jargon-text`). All are free to redistribute; the logged line says which were used.
"""

from __future__ import annotations

import gzip
import logging
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

logger = logging.getLogger(__name__)

_ANARCHISM = Path("/usr/share/doc/anarchism/html")
_JARGON = Path("/usr/share/doc/jargon-text/jargon.txt.gz")
_PART = 100_000
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data", "lib2to3"}


class _Text(HTMLParser):
    """Text of an HTML page: paragraphs on their own lines, no scripts or styles."""

    _BLOCK = frozenset({"p", "br", "div", "li", "h1", "h2", "h3", "h4", "h5", "blockquote", "tr", "title"})
    _HIDDEN = frozenset({"script", "style"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._HIDDEN:
            self._hidden += 1
        elif tag in self._BLOCK:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._HIDDEN:
            self._hidden -= 1

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """Readable text of an HTML page."""
    reader = _Text()
    reader.feed(page)
    reader.close()
    return re.sub(r"[ \t]*\n\s*\n\s*", "\n\n", "".join(reader.parts)).strip()


def parts_at_blank_lines(text: str, size: int = _PART) -> list[str]:
    """Cut a long text at blank lines into parts of about `size` characters; nothing is lost but the blank lines."""
    parts: list[str] = []
    current: list[str] = []
    length = 0
    for paragraph in text.split("\n\n"):
        current.append(paragraph)
        length += len(paragraph) + 2
        if length >= size:
            parts.append("\n\n".join(current))
            current, length = [], 0
    if current:
        parts.append("\n\n".join(current))
    return parts


def python_sources() -> Iterator[tuple[str, str]]:
    """`(id, text)` of the standard library's source files, without tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED.isdisjoint(relative.parts) and not path.name.startswith("_sysconfigdata"):
            yield f"python/{relative.as_posix()}", path.read_text(encoding="utf-8", errors="replace")


def python_topics() -> Iterator[tuple[str, str]]:
    """`(id, text)` of the prose that Python's `help()` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        yield f"python-topics/{name}", topics[name]


def bible_books() -> Iterator[tuple[str, str]]:
    """`(id, text)` of the King James Bible by book, as Debian's `bible` program prints it."""
    program = shutil.which("bible")
    if program is None:
        return
    command = [program, "-l10000", "gen1:1-rev22:21"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        logger.warning("bible: %s", done.stderr.strip() or f"exit status {done.returncode}")
        return
    books: dict[str, list[str]] = {}
    book = ""
    for line in done.stdout.splitlines():
        heading = re.fullmatch(r"(\S.*) (\d+)", line)
        if heading:
            book = heading[1]
        books.setdefault(book, []).append(line.strip())
    for name, lines in books.items():
        if name:
            yield f"bible/{name}", re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def anarchist_faq() -> Iterator[tuple[str, str]]:
    """`(id, text)` of the Anarchist FAQ by page."""
    for path in sorted(_ANARCHISM.glob("*.html")):
        yield f"anarchism/{path.stem}", html_text(path.read_text(encoding="utf-8", errors="replace"))


def jargon_file() -> Iterator[tuple[str, str]]:
    """`(id, text)` of the Jargon File in parts of about 100,000 characters."""
    if not _JARGON.is_file():
        return
    with gzip.open(_JARGON, "rt", encoding="utf-8", errors="replace") as stream:
        text = stream.read()
    for index, part in enumerate(parts_at_blank_lines(text)):
        yield f"jargon/{index:03d}", part


SYSTEM_SOURCES = {
    "bible": bible_books,
    "anarchism": anarchist_faq,
    "jargon": jargon_file,
    "python-topics": python_topics,
    "python": python_sources,
}


def system_texts() -> list[tuple[str, str]]:
    """All `(id, text)` of this machine's long texts, in a fixed order; logs how many each source gave."""
    found = {name: list(source()) for name, source in SYSTEM_SOURCES.items()}
    counts = ", ".join(f"{name} {len(texts)}" for name, texts in found.items())
    logger.info("system corpus, documents found: %s", counts)
    return [item for texts in found.values() for item in texts]
