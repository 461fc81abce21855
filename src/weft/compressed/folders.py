"""Adapter folders made smaller: opened, measured, and written with where they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from weft.adapter import native_tensors
from weft.attach import free_name, records, use
from weft.compress import packed
from weft.compressed.opened import folder_bytes, loss_per_token, open_folders, prove, provenance, write_card
from weft.compressing import Roots, Shrunk, Way, input_roots, shrink
from weft.gate import held_out, inputs_of
from weft.interop.folder import save
from weft.parity import Parity, parity
from weft.reopen import Reopened, adapter_folder

__all__ = ["CompressedFolder", "LossIn", "compress_folders"]

LossIn = Literal["weights", "output"]
_CALIBRATION_ROWS = 64
_OF = {"change": "its change", "output": "its change of the outputs", "tensors": "its tensors"}


@dataclass(frozen=True)
class CompressedFolder:
    """One adapter made smaller. folder, parity: None where it was refused, or another of the same call was.

    stated: the loss that was asked for, of the change's norm, or of the loss per token on `source` where it is named;
    None where a size was. disk_before, disk_after: bytes of the files in the folders.
    """

    shrunk: Shrunk
    stated: float | None
    source: str | None
    folder: Path | None = None
    parity: Parity | None = None
    disk_before: int | None = None
    disk_after: int | None = None

    def __str__(self) -> str:
        s = self.shrunk
        if s.refused:
            return f"{s.name}: refused: {s.refused}"
        worst = max(s.losses, key=lambda address: s.losses[address])
        part = s.bytes_after / s.bytes_before
        lines = [
            f"{s.name}: {s.way}, {s.bytes_before:,} bytes before, {s.bytes_after:,} after ({part:.1%})",
            f"lost of {_OF[s.of]}: at most {s.losses[worst]:.3%} of the norm ({worst})",
        ]
        if s.growth is not None:
            asked = "" if self.stated is None else f"; at most {self.stated:.3%} was asked for"
            lines.append(
                f"loss per token on {self.source}: {s.before:.5f} before, {s.after:.5f} after ({s.growth:+.3%}{asked})"
            )
        if s.alpha is not None:
            lines.append(f"alpha {s.alpha:g} of the standard deviation of each tensor, by that loss")
        if self.disk_before is not None and self.disk_after is not None:
            lines.append(f"on disk, with what describes it: {self.disk_before:,} and {self.disk_after:,} bytes")
        return "\n".join([*lines, *([str(self.parity)] if self.parity else []), f"written: {self.folder}"])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        s = self.shrunk
        ranks = {} if s.plan is None else {p.site.address: getattr(p.method, "rank", None) for p in s.plan.sites}
        return {
            "name": s.name, "way": s.way, "folder": None if self.folder is None else str(self.folder),
            "refused": s.refused, "stated": self.stated, "source": self.source, "bytes_before": s.bytes_before,
            "bytes_after": s.bytes_after, "disk_before": self.disk_before, "disk_after": self.disk_after,
            "of": s.of, "losses": dict(s.losses), "ranks": ranks, "settings": dict(s.settings),
            "alpha": s.alpha, "before": s.before, "after": s.after, "growth": s.growth,
            "parity": None if self.parity is None else asdict(self.parity),
        }  # fmt: skip


def compress_folders(
    folders: Sequence[Path],
    out: Path,
    *,
    way: Way = "principal",
    loss: float | None = None,
    size: float | None = None,
    loss_in: LossIn = "weights",
    data: Sequence[str] | None = None,
    calibrate: Sequence[str] | None = None,
    base: str | None = None,
    any_base: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[CompressedFolder]:
    """Make adapters of one base as small as a stated loss allows (`weft.compressing.shrink`), and write them.

    One goes to the folder `out`; several to folders in it that have their names.
    loss: the share of the change's norm that may be lost at a site; with `data`, rows of any kind that `weft eval`
        reads, the share by which the loss per token on them may grow. size: instead, the share of its bytes that may
        remain. loss_in: of the weights, or of the sites' outputs on rows of `calibrate` (else of `data`, else of the
        adapter's own held-out data).
    Nothing is written where one of them is refused.
    Raises AdapterError for an adapter that no weight can express, and for a folder that is there already.
    """
    opened = open_folders(folders, out, base, any_base)
    examples = held_out(opened, data)[1] if data is not None else ()
    source = ", ".join(data) if data is not None else None
    measured = (lambda name: loss_per_token(opened, examples, name)) if data is not None else None
    found = []
    for name in opened.names:
        roots = _roots(opened, name, calibrate or data, say) if loss_in == "output" else None
        made = free_name(opened.model, f"{name}-{way}")
        shrunk = shrink(opened.model, name, name=made, way=way, loss=loss, size=size, loss_of=measured, roots=roots)
        found.append(CompressedFolder(shrunk, loss, source))
        say(f"{name}: {'refused' if shrunk.refused else f'{shrunk.bytes_before:,} to {shrunk.bytes_after:,} bytes'}")
    if any(each.shrunk.refused for each in found):
        return found
    inputs = inputs_of(opened, held_out(opened, data)[1], rows=8)
    return [
        _written(opened, each, out if len(folders) == 1 else out / each.shrunk.name, folder, inputs)
        for each, folder in zip(found, folders, strict=True)
    ]


def _roots(opened: Reopened, name: str, data: Sequence[str] | None, say: Callable[[str], None]) -> Roots:
    source, examples = held_out(opened, data)
    count = min(_CALIBRATION_ROWS, len(examples))
    say(f"{name}: outputs are compared on {count} rows of {source}")
    rows = [examples[i * len(examples) // count] for i in range(count)]
    return input_roots(opened.model, name, [inputs_of(opened, [row], rows=1) for row in rows])  # padding is no input


def _written(
    opened: Reopened, each: CompressedFolder, place: Path, folder: Path, inputs: Mapping[str, Tensor]
) -> CompressedFolder:
    s = each.shrunk
    assert s.plan is not None, "what is written was made"
    use(opened.model, s.plan.name)
    checked = parity(opened.model, s.plan.name, inputs, ways=("saved", "merged", "unmerged", "peft"))
    facts = {
        "parent": {"name": s.name, "folder": str(adapter_folder(folder))}, "way": s.way,
        "stated": each.stated, "of": s.of if each.source is None else "loss per token", "source": each.source,
        "loss": max(s.losses.values()), "before": s.before, "after": s.after,
        "bytes_before": s.bytes_before, "bytes_after": s.bytes_after,
    }  # fmt: skip
    held = packed(native_tensors(records(opened.model)[s.plan.name]), s.codes) if s.codes else None
    save(opened.model, place, s.plan.name, provenance=provenance(folder, opened, {"compressed": facts}), held=held)
    if held is not None:
        prove(opened, place, s.plan.name)
    sizes = folder_bytes(adapter_folder(folder)), folder_bytes(place)
    result = replace(each, folder=place, parity=checked, disk_before=sizes[0], disk_after=sizes[1])
    write_card(place, opened.base, f"made smaller out of `{s.name}`", str(result))
    return result
