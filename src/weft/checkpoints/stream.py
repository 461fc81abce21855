"""Writing safetensors files tensor by tensor: memory of one tensor, and a killed writer goes on where it stopped."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weft.checkpoints.weights import DTYPES, INDEX, SINGLE, CheckpointError

__all__ = ["Out", "plan_files", "write_file", "write_index"]

_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Out:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_files(outs: Sequence[Out], shard_bytes: int) -> dict[str, list[Out]]:
    """Which file each tensor goes to, in order: files of at most `shard_bytes`, or of one larger tensor."""
    shards: list[list[Out]] = [[]]
    for out in outs:
        if shards[-1] and sum(o.num_bytes for o in shards[-1]) + out.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(out)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_file(path: Path, outs: Sequence[Out], make: Callable[[Out], Iterable[Tensor]]) -> None:
    """Write a safetensors file. Nothing is done for a file that is there; a half written one is gone on with.

    make: a tensor's entries in order, in flat pieces of its number format on the CPU.
    The header is known beforehand, so tensors are made, written and dropped one after another; until the file is whole
    it has the suffix `.part`, whose length says how many are done.
    """
    if path.exists():
        return
    head = _header(outs)
    part = path.with_name(f"{path.name}.part")
    offset = len(head)
    # a thread of its own writes one piece while the next one is made
    with part.open("r+b" if part.exists() else "w+b") as file, ThreadPoolExecutor(1) as writer:
        if file.read(len(head)) != head:  # another merge's, or cut within its header: begin anew
            file.seek(0)
            file.truncate()
            file.write(head)
        length, written = file.seek(0, 2), None
        for out in outs:
            end = offset + out.num_bytes
            if end > length:
                if written is None:
                    file.seek(offset)
                    file.truncate()
                for piece in make(out):
                    assert piece.dtype == out.dtype, f"{out.name}: {piece.dtype} was made, not {out.dtype}"
                    if written is not None:
                        written.result()
                    written = writer.submit(file.write, piece.view(torch.uint8).numpy().data)
                    offset += piece.nbytes
                assert offset == end, f"{out.name}: {offset - end + out.num_bytes} bytes were made, not {out.num_bytes}"
            offset = end
        if written is not None:
            written.result()
    part.replace(path)


def write_index(folder: Path, files: Mapping[str, Sequence[Out]]) -> None:
    """The index that names the file of every tensor; none where one file holds all."""
    if len(files) < 2:
        return
    size = sum(out.num_bytes for outs in files.values() for out in outs)
    weight_map = {out.name: file for file, outs in files.items() for out in outs}
    body = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2, sort_keys=True)
    (folder / INDEX).write_text(body + "\n", encoding="utf-8")


def _header(outs: Sequence[Out]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for out in outs:
        if out.dtype not in _CODES:
            raise CheckpointError(f"{out.name}: safetensors has no {out.dtype}")
        end = offset + out.num_bytes
        entries[out.name] = {"dtype": _CODES[out.dtype], "shape": list(out.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return struct.pack("<Q", len(text)) + text
