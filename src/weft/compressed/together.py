"""Sets of adapter folders made smaller together: one file of what they share, and a small folder for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weft.adapter import native_tensors
from weft.attach import free_name, records, use
from weft.borrowed import lend, lent
from weft.compressed.opened import folder_bytes, loss_per_token, open_folders, prove, provenance, write_card
from weft.compressing import SetWay, Together, compress_together, num_bytes
from weft.errors import AdapterError
from weft.gate import held_out, inputs_of
from weft.interop.folder import save
from weft.parity import Parity, parity
from weft.reopen import Reopened, adapter_folder

__all__ = ["CompressedSet", "compress_set"]

BASIS = "basis.safetensors"


@dataclass(frozen=True)
class CompressedSet:
    """Adapters made smaller together. parity: of the one that loses most. seconds: of finding the bases.

    bytes_before, bytes_after: of the files of all folders, and of what they share.
    """

    folder: Path
    way: str
    names: Sequence[str]
    losses: dict[str, float]
    mean: float
    worst: tuple[str, str, float]
    bytes_before: int
    bytes_after: int
    bytes_shared: int
    seconds: float
    parity: Parity
    growth: dict[str, float]
    source: str | None = None

    def __str__(self) -> str:
        name, address, loss = self.worst
        grown = ""
        if self.growth:
            most = max(self.growth, key=lambda n: self.growth[n])
            grown = f"loss per token on {self.source}: {self.growth[most]:+.3%} at most ({most})\n"
        return (
            f"{len(self.names)} adapters, {self.way}: {self.bytes_before:,} bytes before, {self.bytes_after:,} after "
            f"({self.bytes_after / self.bytes_before:.1%}), of which {self.bytes_shared:,} are shared\n"
            f"lost of a change: {self.mean:.2%} of the norm on average, at most {loss:.2%} ({name}, {address})\n{grown}"
            f"bases found in {self.seconds:.1f} s\n{self.parity}\nwritten: {self.folder}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "folder": str(self.folder), "parity": asdict(self.parity)}


def compress_set(
    folders: Sequence[Path],
    out: Path,
    *,
    way: SetWay = "joint",
    rank: int | None = None,
    loss: float | None = None,
    clusters: int = 1,
    diagonal: bool = False,
    data: Sequence[str] | None = None,
    base: str | None = None,
    any_base: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> CompressedSet:
    """Write adapters of one base as a set that shares its bases (`weft.compressing.compress_together`).

    data: rows; `loss` is then the share by which the loss per token of each adapter on them may grow.
    Each is a folder in `out` that loads as any adapter does; the bases are in one file beside them, and in memory once
    however many of the set are loaded.
    Raises AdapterError for fewer than two adapters, where a basis cannot hold what one of them changes, and where the
    set would be no smaller than its adapters.
    """
    if len(folders) < 2:
        raise AdapterError(f"{way} keeps what adapters have in common: give two or more, or another --way for one")
    opened = open_folders(folders, out, base, any_base)
    names = [free_name(opened.model, f"{name}-{way}") for name in opened.names]
    examples = held_out(opened, data)[1] if data is not None else ()
    started = time.perf_counter()
    made = compress_together(
        opened.model, opened.names, names, way=way, rank=rank, loss=loss, clusters=clusters, diagonal=diagonal,
        loss_of=(lambda name: loss_per_token(opened, examples, name)) if data is not None else None, say=say,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    _check_smaller(opened, made)
    worst = made.worst
    checked = _checked(opened, dict(zip(opened.names, names, strict=True))[worst[0]])
    lend(out / BASIS, made.bases)
    for folder, source, name in zip(folders, opened.names, names, strict=True):
        _write(opened, made, folder, source, name, out / source, way)
    prove(opened, out / worst[0], dict(zip(opened.names, names, strict=True))[worst[0]])
    shared = (out / BASIS).stat().st_size
    return CompressedSet(
        out, way, opened.names, {n: max(own.values()) for n, own in made.losses.items()}, made.mean, worst,
        sum(folder_bytes(adapter_folder(f)) for f in folders),
        shared + sum(folder_bytes(out / name) for name in opened.names), shared, seconds, checked, dict(made.growth),
        ", ".join(data) if data is not None else None,
    )  # fmt: skip


def _check_smaller(opened: Reopened, made: Together) -> None:
    before = sum(num_bytes(opened.model, name) for name in opened.names)
    borrowed = sum(made.bases[key].nbytes for shared in made.shared.values() for key in shared.values())
    after = sum(num_bytes(opened.model, name) for name in made.names) - borrowed
    after += sum(t.nbytes for t in made.bases.values())
    if after >= before:
        raise AdapterError(
            f"together the {len(made.names)} adapters would take {after:,} bytes, and they have {before:,}: a smaller "
            "--rank, fewer --clusters, a larger --loss, or more adapters share more"
        )


def _checked(opened: Reopened, name: str) -> Parity:
    use(opened.model, name)
    inputs = inputs_of(opened, held_out(opened)[1], rows=8)
    return parity(opened.model, name, inputs, ways=("saved", "merged", "unmerged"))


def _write(opened: Reopened, made: Together, folder: Path, source: str, name: str, place: Path, way: str) -> None:
    shared = made.shared[name]
    own = {key: t for key, t in native_tensors(records(opened.model)[name]).items() if key not in shared}
    facts = {
        "parent": {"name": source, "folder": str(adapter_folder(folder))}, "way": way, "of": "change",
        "loss": max(made.losses[source].values()), "set": list(made.losses),
    }  # fmt: skip
    borrowed = {"borrowed": lent(place, place.parent / BASIS, shared)}
    save(opened.model, place, name, provenance=provenance(folder, opened, {"compressed": facts}), held=(own, borrowed))
    loss = max(made.losses[source].values())
    text = (
        f"{source}: {way} with {len(made.losses) - 1} others; {BASIS} beside its folder is part of it\n"
        f"lost of its change: at most {loss:.3%} of the norm"
    )
    write_card(place, opened.base, f"made smaller out of `{source}`", text)
