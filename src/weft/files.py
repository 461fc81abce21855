"""Finding what a path or a glob names."""

from __future__ import annotations

import glob
from pathlib import Path

from weft.errors import DataError, nearest

__all__ = ["find"]


def find(name: str) -> list[Path]:
    """What one name stands for: a path that exists, or every match of a glob. Raises DataError when there is none."""
    path = Path(name).expanduser()
    if path.exists():
        return [path]
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207 - Path.glob refuses roots
    if not matches:
        beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, beside) if beside else f"the folder {path.parent} does not exist or is empty"
        raise DataError(f"no data at '{name}': {hint}")
    return matches
