"""Tensors that several adapters share: in one file beside their folders, and once in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from weakref import WeakValueDictionary

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["borrowed", "lend", "lent"]

_IN_MEMORY: WeakValueDictionary[tuple[str, str], Tensor] = WeakValueDictionary()
"""By a file's digest and a tensor's name: what adapters that are loaded hold of it."""


def lend(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors that adapters in folders near this file share."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.part")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, {"format": "pt"})
    temporary.replace(file)


def lent(folder: Path, file: Path, names: Mapping[str, str]) -> str:
    """What the tensors' file of an adapter in `folder` says of those that it borrows: their names here and there."""
    facts = {"file": os.path.relpath(file, folder), "digest": _digest(file), "names": dict(names)}
    return json.dumps(facts, separators=(",", ":"))


def borrowed(folder: Path, facts: str) -> dict[str, Tensor]:
    """The tensors that an adapter's folder borrows. ValueError for a file that is not there, or not the one it was."""
    try:
        known = json.loads(facts)
        file, digest, names = folder / known["file"], str(known["digest"]), dict(known["names"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"what it says of the tensors that it borrows is not readable: {error}") from error
    if not file.is_file():
        raise ValueError(
            f"it shares tensors with other adapters in {file}, which is not there: move the folders of a set together"
        )
    if _digest(file) != digest:
        raise ValueError(
            f"it shares tensors with other adapters in {file}, which was written anew since: it is damaged"
        )
    found = {name: t for name, there in names.items() if (t := _IN_MEMORY.get((digest, there))) is not None}
    if len(found) < len(names):
        found |= _read(file, digest, {name: there for name, there in names.items() if name not in found})
    return found


def _read(file: Path, digest: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    try:
        with safe_open(file, "pt") as stored:
            for name, there in names.items():
                found[name] = _IN_MEMORY.setdefault((digest, there), stored.get_tensor(there).clone())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} does not hold what it borrows: {error}") from error
    return found


def _digest(file: Path) -> str:
    state = file.stat()
    return _digest_of(str(file.resolve()), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _digest_of(file: str, _changed: int, _size: int) -> str:
    with Path(file).open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
