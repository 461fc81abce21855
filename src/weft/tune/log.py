"""What a run says while it goes: one JSON object a line in log.jsonl, and TensorBoard events on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from weft.errors import missing_extra

__all__ = ["JsonLines", "Sink", "TensorBoard", "cut_log", "open_log", "read_log"]

Record = dict[str, Any]


class Sink(Protocol):
    """Takes records: `event` says what happened, `step` when, the other values are numbers."""

    def write(self, record: Record) -> None:
        """Keep one record."""

    def close(self) -> None:
        """Make sure that everything is on the disk."""


class JsonLines:
    """Appends records to a file, each on the disk's side of Python's buffer at once, so that a kill loses none."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Writes every number of a record as a scalar `event/name`."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_extra("tensorboard", needs="tensorboard") from error
        self._writer = SummaryWriter(str(folder))

    def write(self, record: Record) -> None:
        """One scalar for every number."""
        for key, value in record.items():
            if key not in ("event", "step") and isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(f"{record['event']}/{key}", value, record.get("step", 0))

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def open_log(folder: Path, *, tensorboard: bool) -> list[Sink]:
    """The sinks of a run. Raises MissingExtra before anything is trained when TensorBoard is wanted and not there."""
    sinks: list[Sink] = [TensorBoard(folder / "tensorboard")] if tensorboard else []
    return [JsonLines(folder / "log.jsonl"), *sinks]


def read_log(path: Path) -> list[Record]:
    """Every whole record of a log; a last line that a kill cut short is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


def cut_log(path: Path, step: int) -> None:
    """Drop what a broken run logged after the step that it goes on from."""
    kept = [r for r in read_log(path) if r.get("step", 0) <= step and r.get("event") != "end"]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    temporary.replace(path)
