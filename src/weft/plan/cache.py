"""What is remembered about this machine: how fast it is, and what past runs took."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["append_record", "cache_folder", "read_json", "read_records", "write_json"]

RUNS = "runs.jsonl"


def cache_folder() -> Path:
    """$WEFT_CACHE, else `weft` in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("WEFT_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "weft"


def read_json(name: str) -> dict[str, Any]:
    """A file of the cache; {} when there is none, or none that can be read."""
    try:
        found = json.loads((cache_folder() / name).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(name: str, value: Mapping[str, Any]) -> None:
    """Write a file of the cache so that a reader never sees half of it."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{name}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")
    temporary.replace(folder / name)


def append_record(record: Mapping[str, Any]) -> None:
    """Add one past run. One short write, so that two runs that end together do not mix their lines."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RUNS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_records() -> list[dict[str, Any]]:
    """Every past run that can be read, oldest first."""
    try:
        lines = (cache_folder() / RUNS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
