"""Adapter folders turned into LoRA: opened, compared with the original, and written with where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.attach import free_name, records, using
from weft.compressed.opened import open_folders, provenance, write_card
from weft.compressing import num_bytes, to_lora
from weft.gate import held_out, inputs_of
from weft.interop.folder import save
from weft.parity import TOLERANCES
from weft.reopen import Reopened, adapter_folder

__all__ = ["ConvertedFolder", "convert_folder"]


@dataclass(frozen=True)
class ConvertedFolder:
    """An adapter as LoRA. difference: of the logits, the largest; tolerance: what it may be where nothing is cut."""

    name: str
    folder: Path
    method: str
    losses: Mapping[str, float]
    bytes_before: int
    bytes_after: int
    difference: float
    largest: float
    agreement: float
    tolerance: float | None

    @property
    def passed(self) -> bool:
        """Whether the logits are those of the original, where they should be."""
        return self.tolerance is None or self.difference <= self.tolerance

    def __str__(self) -> str:
        worst = max(self.losses, key=lambda address: self.losses[address])
        asked = (
            "" if self.tolerance is None else f"; at most {self.tolerance:.2g}: {'ok' if self.passed else 'DIFFERS'}"
        )
        return (
            f"{self.name}: {self.method} as lora, {self.bytes_before:,} bytes before, {self.bytes_after:,} after\n"
            f"lost of its change: at most {self.losses[worst]:.2e} of the norm ({worst})\n"
            f"logits against the original: {self.difference:.2e} at most (the largest is {self.largest:.3g}{asked}), "
            f"the same best token at {self.agreement:.1%} of positions\nwritten: {self.folder}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "folder": str(self.folder), "layout": "lora", "passed": self.passed}


def convert_folder(
    folder: Path,
    out: Path,
    *,
    rank: int | None = None,
    loss: float | None = None,
    base: str | None = None,
    any_base: bool = False,
) -> ConvertedFolder:
    """Write an adapter of any method that a weight can express as LoRA (`weft.compressing.to_lora`).

    The logits of both are compared; where neither `rank` nor `loss` cuts anything, they should agree.
    Raises AdapterError with the reason where no LoRA does what the adapter does.
    """
    opened = open_folders([folder], out, base, any_base)
    model, source = opened.model, opened.names[0]
    name = free_name(opened.model, f"{source}-lora")
    losses = to_lora(model, source, name=name, rank=rank, loss=loss)
    inputs = inputs_of(opened, held_out(opened)[1], rows=8)
    theirs, ours = _logits(opened, inputs, source), _logits(opened, inputs, name)
    largest = float(theirs.abs().max())
    exact = rank is None and loss is None
    tolerance = TOLERANCES[next(model.parameters()).dtype] * max(1.0, largest) if exact else None
    method = records(model)[source].plan.method
    result = ConvertedFolder(
        source, out, method.name, losses, num_bytes(model, source), num_bytes(model, name),
        float((theirs - ours).abs().max()), largest, float((theirs.argmax(-1) == ours.argmax(-1)).float().mean()),
        tolerance,
    )  # fmt: skip
    parent = {"name": source, "folder": str(adapter_folder(folder)), "method": method.spec()}
    facts = {"parent": parent, "to": "lora", "loss": max(losses.values()), "difference": result.difference}
    save(model, out, name, provenance=provenance(folder, opened, {"converted": facts}))
    write_card(out, opened.base, f"converted out of `{source}` ({method})", str(result))
    return result


@torch.no_grad()
def _logits(opened: Reopened, inputs: Mapping[str, Tensor], name: str) -> Tensor:
    """[N, V] at the positions that count, in a precision that differences can bear."""
    with using(opened.model, name):
        found: Tensor = opened.model(**inputs).logits
    return found[inputs["attention_mask"].bool()].float()
