"""The text that pico and the bundled examples are made from: Python's own standard library, and how it is split.

One rule decides the split of every module, for the base model and for every example task alike:

- a module of a package in `HELD_OUT` (and the tests of that package) is never trained on by anything: split "heldout";
- the other modules of a package are ranked by the SHA-256 of their path; the first tenth is "test", the next tenth is
  "validation" (at least one each where a package has three modules or more), the rest is "train".

Run it to print what the corpus holds: `python scripts/corpus.py`.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
import tokenize
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["HELD_OUT", "LICENCE", "SPLITS", "Module", "corpus_facts", "digest", "in_split", "modules"]

LICENCE = "PSF-2.0, the Python Software Foundation License Version 2 (the whole stack is Python-2.0 in SPDX's list)"
SPLITS = ("train", "validation", "test", "heldout")
HELD_OUT = frozenset({"concurrent", "dbm", "email", "html", "sqlite3", "tomllib", "wsgiref", "xmlrpc", "zoneinfo"})
TOP_LEVEL = "(top level)"

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_SKIPPED_FOLDERS = frozenset({"site-packages", "__pycache__", "pydoc_data", "lib-dynload", "data"})
_MAX_BYTES = 400_000  # one larger file would be a visible share of the corpus by itself
# What marks a generated codec: a table, not a program.
_TABLE_MARKS = ("decoding_table = (", "decoding_map = codecs.make_identity_dict", "codec = _codecs_")


@dataclass(frozen=True)
class Module:
    """One source file: its path below the standard library, its text, and where the split rule puts it."""

    path: str  # posix, relative to the standard library: "asyncio/base_events.py"
    text: str
    package: str  # first folder, or TOP_LEVEL
    is_test: bool
    split: str

    @property
    def name(self) -> str:
        """The dotted module name."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def modules() -> tuple[Module, ...]:
    """Every usable module of the running interpreter's standard library, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, str] = {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        text = None if _skipped(path) else _read(file)
        if text is not None:
            texts[path.as_posix()] = text
    splits = _split(list(texts))
    return tuple(
        Module(path=path, text=text, package=_package(path), is_test=_is_test(path), split=splits[path])
        for path, text in sorted(texts.items())
    )


def in_split(split: str, *, tests: bool) -> list[Module]:
    """The modules of one split, either only the library's (`tests=False`) or only its test suites' (`tests=True`)."""
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; the splits are {', '.join(SPLITS)}")
    return [module for module in modules() if module.split == split and module.is_test == tests]


def digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def corpus_facts() -> dict[str, object]:
    """What a model card must say: the interpreter, the hash of the whole corpus, and counts for each split."""
    whole = hashlib.sha256()
    for module in modules():
        whole.update(f"{module.path}\0{module.split}\0{digest(module.text)}\n".encode())
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        for tests in (False, True):
            chosen = in_split(split, tests=tests)
            num_bytes = sum(len(module.text.encode()) for module in chosen)
            counts[f"{split}, {'test suites' if tests else 'library'}"] = {"modules": len(chosen), "bytes": num_bytes}
    return {"python": platform.python_version(), "corpus_sha256": whole.hexdigest(), "counts": counts}


def _skipped(path: Path) -> bool:
    folders = path.parts[:-1]
    return any(part in _SKIPPED_FOLDERS or part.startswith("config-") for part in folders)


def _read(file: Path) -> str | None:
    """The text of a module, or None if it is empty, too large, undecodable or a generated codec table."""
    if not 0 < file.stat().st_size <= _MAX_BYTES:
        return None
    try:
        with tokenize.open(file) as stream:
            text = stream.read()
    except (SyntaxError, UnicodeDecodeError):  # the test suite holds broken files on purpose
        return None
    if not text.strip() or any(mark in text for mark in _TABLE_MARKS):
        return None
    return text


def _package(path: str) -> str:
    return path.split("/", maxsplit=1)[0] if "/" in path else TOP_LEVEL


def _is_test(path: str) -> bool:
    return any(part in _TEST_FOLDERS for part in path.split("/")[:-1])


def _tests_held_out(path: str) -> bool:
    """Whether a file of the package `test` belongs to a held-out package, by its name: test/test_email/..."""
    parts = path.removesuffix(".py").split("/")[1:]
    return any(part.startswith((f"test_{package}", f"{package}_", package)) for part in parts for package in HELD_OUT)


def _split(paths: list[str]) -> dict[str, str]:
    groups: dict[tuple[str, bool], list[str]] = defaultdict(list)
    result: dict[str, str] = {}
    for path in paths:
        package = _package(path)
        if package in HELD_OUT or (package == "test" and _tests_held_out(path)):
            result[path] = "heldout"
        else:
            groups[package, _is_test(path)].append(path)
    for members in groups.values():
        ranked = sorted(members, key=digest)
        each = max(1, round(len(ranked) / 10)) if len(ranked) >= 3 else 0
        for rank, path in enumerate(ranked):
            result[path] = "test" if rank < each else "validation" if rank < 2 * each else "train"
    return result


def _main() -> None:
    facts = corpus_facts()
    print(f"Python {facts['python']}, corpus sha256 {facts['corpus_sha256']}")
    for name, count in facts["counts"].items():  # type: ignore[attr-defined]
        print(f"{name:28} {count['modules']:5} modules {count['bytes']:10,} bytes")


if __name__ == "__main__":
    _main()
