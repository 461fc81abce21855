"""What all commands that write a smaller adapter need: adapters opened on their base, measured, and their origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.adapter import native_tensors, read_info
from weft.attach import detach, free_name, records, use
from weft.data.rows import Example
from weft.errors import AdapterError
from weft.interop.folder import load
from weft.reopen import Reopened, adapter_folder, reopen

__all__ = ["folder_bytes", "loss_per_token", "open_folders", "prove", "provenance", "write_card"]

_ROWS = 64  # measured at most, evenly spread over the data


def open_folders(folders: Sequence[Path], out: Path, base: str | None, any_base: bool) -> Reopened:
    """Adapters on their base. AdapterError where `out` is there already, or where no weight stands under one."""
    if out.exists():
        raise AdapterError(f"{out} is there already: name a new folder")
    opened = reopen([*folders], base=base, any_base=any_base)
    if opened.task == "classification":
        raise AdapterError(
            f"{opened.names[0]} has a classifier's head, which no base weight stands under: it cannot be written as a "
            "change of one"
        )
    return opened


def loss_per_token(opened: Reopened, examples: Sequence[Example], name: str) -> float:
    """The mean loss of an adapter on rows, at most 64 of them."""
    from weft.tune.evaluate import measure

    chosen = [examples[i * len(examples) // _ROWS] for i in range(_ROWS)] if len(examples) > _ROWS else examples
    use(opened.model, name)
    return float(measure(opened.model, opened.tokenizer, chosen, task=opened.task, batch_size=8)["loss"])


def provenance(folder: Path, opened: Reopened, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the parent, and what was done: that a repair fits one base alone is not forgotten."""
    info = read_info(adapter_folder(folder)) or {"provenance": {}, "base": {}}
    known = {k: v for k, v in info.get("provenance", {}).items() if k not in ("metrics", "repaired")}
    return {**known, **facts, "base": opened.base, "repaired": bool(info["base"].get("tied"))}


def write_card(place: Path, base: str, what: str, found: str) -> None:
    """The README of a folder."""
    text = f"# {place.name}\n\nAn adapter for `{base}`, {what}.\n\n```text\n{found}\n```\n"
    (place / "README.md").write_text(text, encoding="utf-8")


def folder_bytes(folder: Path) -> int:
    """Bytes of an adapter's files: its tensors and what describes them, without the card for people."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))


def prove(opened: Reopened, place: Path, name: str) -> None:
    """That a folder, read again, has the very tensors that were measured; AdapterError otherwise."""
    again = free_name(opened.model, f"{name}-again")
    load(opened.model, place, again, any_base=True)
    try:
        live, read = (native_tensors(records(opened.model)[n]) for n in (name, again))
        wrong = [key for key in live if key not in read or not live[key].equal(read[key])]
        if wrong:
            raise AdapterError(f"{place} does not hold what was measured: {wrong[0]} differs; do not use it")
    finally:
        detach(opened.model, again)
