"""Padding, counts, and the exactness of sums over uneven batches."""

from __future__ import annotations

from array import array

import torch

from weft.data.batch import collate
from weft.data.rows import IGNORED, Example
from weft.objectives.next_token import next_token_loss


def example(length: int, prompt: int) -> Example:
    ids = array("i", range(1, length + 1))
    labels = array("i", [IGNORED] * prompt + list(ids[prompt:]))
    return Example(ids, labels, "f", 1)


def test_right_padding_and_counts() -> None:
    batch = collate([example(4, 1), example(2, 1)], pad_token=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [1, 2, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 2, 3, 4], [IGNORED, 2, IGNORED, IGNORED]]
    assert (batch.num_trained, batch.num_tokens) == (4, 6)
    assert collate([example(5, 1)], pad_token=0, multiple_of=4).input_ids.shape == (1, 8)
    assert batch.to("cpu").labels.equal(batch.labels)


def test_class_labels() -> None:
    rows = [Example(array("i", [1, 2]), 2, "f", 1), Example(array("i", [1]), 0, "f", 2)]
    batch = collate(rows, pad_token=0)
    assert batch.labels.tolist() == [2, 0]
    assert (batch.num_trained, batch.num_tokens) == (2, 3)


def test_accumulated_loss_equals_that_of_one_batch() -> None:
    """Uneven rows, cut into batches in any way, give the same mean: sums over sums, not a mean of means."""
    table = torch.randn(32, 32, dtype=torch.float64)
    rows = [example(9, 1), example(3, 2), example(5, 4), example(2, 1), example(7, 3)]

    def total(cuts: list[int]) -> tuple[float, int]:
        losses, counts, start = 0.0, 0, 0
        for stop in [*cuts, len(rows)]:
            batch = collate(rows[start:stop], pad_token=0)
            loss, count, _ = next_token_loss(table[batch.input_ids], batch.labels)
            assert count == batch.num_trained
            losses, counts, start = losses + loss.item(), counts + count, stop
        return losses / counts, counts

    whole = total([])
    for cuts in ([1], [2, 4], [1, 2, 3, 4]):
        mean, count = total(cuts)
        assert count == whole[1]
        assert abs(mean - whole[0]) < 1e-5
