"""The order of rows in training: a pure function of (seed, epoch), so a position is two numbers and resuming exact."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

__all__ = ["Position", "batches", "epoch_order", "num_batches"]

_POOL_BATCHES = 50  # bucketing sorts within pools of this many batches: little padding, and still a random order


@dataclass(frozen=True, slots=True)
class Position:
    """How far training has come, in rows used this epoch; not in batches, since a resumed run may change their size."""

    epoch: int = 0
    index: int = 0


def epoch_order(
    num_rows: int, *, seed: int, epoch: int, batch_size: int = 1, lengths: Sequence[int] | None = None
) -> array[int]:
    """The rows of one epoch in order. With `lengths`, rows of similar length share a batch (less padding)."""
    # a text seed is hashed with SHA-512, the same on every machine and version
    random = Random(f"weft order {seed} {epoch}")
    order = list(range(num_rows))
    random.shuffle(order)
    return array("q", order if lengths is None else _bucketed(order, lengths, batch_size, random))


def _bucketed(order: list[int], lengths: Sequence[int], batch_size: int, random: Random) -> list[int]:
    pool = _POOL_BATCHES * batch_size
    groups: list[list[int]] = []
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool], key=lambda row: lengths[row])
        groups += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    # the one short batch stays last, so that cutting the order into batches finds the same groups
    last = [groups.pop()] if groups and len(groups[-1]) < batch_size else []
    random.shuffle(groups)
    return [row for group in groups + last for row in group]


def batches(
    num_rows: int,
    *,
    batch_size: int,
    seed: int,
    start: Position = Position(),
    lengths: Sequence[int] | None = None,
) -> Iterator[tuple[list[int], Position]]:
    """Row indices of batch after batch, without end, each with the position after it, from which a new call goes on.

    The last batch of an epoch may be smaller; a batch never spans two epochs, and no row is left out.
    """
    if num_rows < 1:
        raise ValueError(f"there are {num_rows} rows: nothing to draw batches from")
    if not 0 <= start.index < num_rows:
        raise ValueError(f"the position {start.index} is outside of the {num_rows} rows; has the data changed?")
    epoch, index = start.epoch, start.index
    while True:
        order = epoch_order(num_rows, seed=seed, epoch=epoch, batch_size=batch_size, lengths=lengths)
        while index < num_rows:
            rows = list(order[index : index + batch_size])
            index += len(rows)
            yield rows, Position(epoch, index) if index < num_rows else Position(epoch + 1, 0)
        epoch, index = epoch + 1, 0


def num_batches(num_rows: int, batch_size: int) -> int:
    """Batches in one epoch, the smaller last one included."""
    return -(-num_rows // batch_size)
