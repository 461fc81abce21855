"""Writing safetensors files tensor by tensor: memory of one tensor, and a killed writer goes on where it stopped."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from weft.checkpoints.jobs import Job, in_order
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


def write_file(path: Path, outs: Sequence[Out], make: Callable[[Out], Iterable[Job]]) -> None:
    """Write a safetensors file. Nothing is done for a file that is there; a half written one is gone on with.

    make: what makes a tensor's entries, in order, in flat pieces of its number format on the CPU.
    The header is known beforehand, so tensors are made, written and dropped one after another; until the file is whole
    it has the suffix `.part`, whose length says how many are done.
    """
    if path.exists():
        return
    head = _header(outs)
    part = path.with_name(f"{path.name}.part")
    with part.open("r+b" if part.exists() else "w+b") as file:
        if file.read(len(head)) != head:  # another merge's, or cut within its header: begin anew
            file.seek(0)
            file.truncate()
            file.write(head)
        length, offset, missing = file.seek(0, 2), len(head), [*outs]
        while missing and offset + missing[0].num_bytes <= length:
            offset += missing.pop(0).num_bytes
        file.seek(offset)
        file.truncate()
        # pieces are made by threads while this one writes: in order, so that what is there is whole up to its end
        with closing(in_order(_jobs(missing, make))) as pieces:
            for piece in pieces:
                file.write(piece.view(torch.uint8).numpy().data)
    part.replace(path)


def _jobs(outs: Iterable[Out], make: Callable[[Out], Iterable[Job]]) -> Iterator[Job]:
    for out in outs:
        made = 0
        for job in make(out):
            yield Job(job.num_entries, partial(_checked, job, out))
            made += job.num_entries
        assert made == torch.Size(out.shape).numel(), f"{out.name}: {made} entries were made for {out.shape}"


def _checked(job: Job, out: Out) -> Tensor:
    piece = job.make()
    assert piece.dtype == out.dtype, f"{out.name}: {piece.dtype} was made, not {out.dtype}"
    assert piece.shape == (job.num_entries,), f"{out.name}: {piece.shape} was made, not {job.num_entries} entries"
    return piece


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
