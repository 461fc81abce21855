"""What passes between the steps of the data room: a row that was read, a row that is bad, a tokenised example."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

__all__ = ["IGNORED", "BadRow", "Example", "Row"]

IGNORED = -100  # the label of a position that is not trained: what torch's cross entropy ignores by default


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read: column -> value, and where it stands (the line, or the row number in a table)."""

    values: dict[str, Any]
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be used: where it stands, a short reason (counted in the report), and the details."""

    file: str
    line: int
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens with their loss mask, as 4-byte arrays: a list of Python integers would take nine times as much.

    `labels` is an array as long as `input_ids` (IGNORED where nothing is learnt, always so at position 0, which nothing
    predicts), or one class index.
    """

    input_ids: array[int]
    labels: array[int] | int
    file: str
    line: int
    note: str = ""  # what was done to it, for the report: "truncated", "split" or nothing

    @property
    def num_trained(self) -> int:
        """Positions that carry loss; 1 for a class label."""
        return 1 if isinstance(self.labels, int) else len(self.labels) - self.labels.count(IGNORED)
