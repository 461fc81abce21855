"""The rows of one optimiser step as batches that go through the model one after another."""

from __future__ import annotations

from collections.abc import Sequence

from weft.data import Batch, Example, collate
from weft.data.pack import concatenate, pack

__all__ = ["micro_batches", "padded_tokens"]


def micro_batches(
    examples: Sequence[Example], *, size: int, pad_token: int, by_length: bool = False, packed_from: int | None = None
) -> list[Batch]:
    """The rows of one step in batches of `size`. by_length: short rows together, which changes no sum.

    packed_from: pack them instead, each row at positions from this one on, in batches of at most as many tokens as
    `size` rows of the longest: no batch takes more memory than the largest padded one, and there are no more of them.
    """
    if packed_from is not None:
        lengths = [len(example.input_ids) for example in examples]
        bins = pack(lengths, size * max(lengths))
        return [concatenate([examples[row] for row in rows], first_position=packed_from) for rows in bins]
    rows = sorted(examples, key=lambda example: len(example.input_ids)) if by_length else list(examples)
    return [collate(rows[i : i + size], pad_token=pad_token) for i in range(0, len(rows), size)]


def padded_tokens(examples: Sequence[Example], *, size: int) -> int:
    """Places that the rows take as padded batches of `size`, in this order; a pair takes two rows."""
    lengths = [(max(len(e.input_ids) for e in row.answers()), 2) if row.rejected else (len(row.input_ids), 1)
               for row in examples]  # fmt: skip
    parts = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    return sum(max(length for length, _ in part) * sum(rows for _, rows in part) for part in parts)
