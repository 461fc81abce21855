"""The weights of a checkpoint folder, one tensor at a time: nothing is read before it is asked for."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weft.errors import WeftError, nearest

__all__ = ["CheckpointError", "Stored", "Weights"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class CheckpointError(WeftError, ValueError):
    """A checkpoint that cannot be read, written, or merged with another."""


@dataclass(frozen=True)
class Stored:
    """What a file says of a tensor. offset: where its data begins in the file, in bytes."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def runs(self, start: int, stop: int, raw: Tensor, wide: Tensor) -> Iterator[Tensor]:
        """The entries from `start` to `stop` in `wide` and its format, as many at a time as it has.

        raw: of its length, in the format of the file. Reading into memory that stays in the processor's cache costs
        less than mapping pages that are looked at once.
        """
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            for at in range(start, stop, len(wide)):
                count = min(len(wide), stop - at)
                self._fill(file, raw[:count])
                yield wide[:count].copy_(raw[:count])

    def _fill(self, file: FileIO, run: Tensor) -> None:
        left: memoryview = run.view(torch.uint8).numpy().data
        while left:
            count = file.readinto(left)
            if not count:
                raise CheckpointError(f"{self.file} has become shorter while it was read")
            left = left[count:]


class Weights(Mapping[str, Stored]):
    """The tensors of a folder with safetensors files, by name, as its index lists them.

    Raises CheckpointError for a folder without such files, or with a file that is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stored: dict[str, Stored] = {}
        for file in _files(folder):
            self._stored |= _header(folder / file)

    def __getitem__(self, name: str) -> Stored:
        if name not in self._stored:
            raise KeyError(name)
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file; its pages go when it does."""
        if name not in self._stored:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}; {nearest(name, self._stored)}")
        with safe_open(self._stored[name].file, "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def config(self) -> dict[str, Any]:
        """config.json, or {} where there is none."""
        file = self.folder / "config.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _files(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return [*dict.fromkeys(named)]
    if (folder / SINGLE).is_file():
        return [SINGLE]
    others = sorted(path.name for path in folder.glob("*.safetensors")) if folder.is_dir() else []
    if len(others) == 1:
        return others
    pickled = [p.name for p in folder.glob("*.bin")] if folder.is_dir() else []
    what = f"only {pickled[0]}, a pickle, which is not opened: convert it to safetensors" if pickled else "none"
    raise CheckpointError(f"{folder} should hold {SINGLE} or {INDEX}; there is {what}")


def _header(file: Path) -> dict[str, Stored]:
    if not file.is_file():
        raise CheckpointError(f"{file} is named by the index and is not there")
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
        with file.open("rb") as raw:  # safetensors has proved the header, and does not say where the data is
            (length,) = struct.unpack("<Q", raw.read(8))
            entries = json.loads(raw.read(length))
        return {
            n: Stored(file, tuple(s.get_shape()), _dtype(s.get_dtype(), n), 8 + length + entries[n]["data_offsets"][0])
            for n, s in slices.items()
        }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or cut short: {error}") from error


def _dtype(code: str, name: str) -> torch.dtype:
    if code not in DTYPES:
        raise CheckpointError(f"{name} is stored as {code}, which is not known here; {nearest(code, DTYPES)}")
    return DTYPES[code]
