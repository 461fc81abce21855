"""The packer: every row once, within the budget, in one order, with no more waste than first-fit; and what it makes."""

from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.data import collate
from weft.data.pack import concatenate, pack
from weft.data.rows import IGNORED, Example
from weft.segments import allowed, lengths_of
from weft.tune.parts import micro_batches, padded_tokens

LENGTHS = st.lists(st.integers(1, 40), max_size=40)


def example(length: int, prompt: int = 1, *, start: int = 1) -> Example:
    ids = array("i", range(start, start + length))
    return Example(ids, array("i", [IGNORED] * prompt + list(ids[prompt:])), "f", 1)


def pair(prompt: int, chosen: int, rejected: int) -> Example:
    row = example(prompt + chosen + rejected, prompt)
    return Example(row.input_ids, row.labels, "f", 1, shared=prompt, rejected=prompt + chosen)


def first_fit(lengths: list[int], capacity: int) -> int:
    room: list[int] = []
    for length in lengths:
        place = next((i for i, left in enumerate(room) if left >= length), None)
        if place is None:
            room.append(capacity - length)
        else:
            room[place] -= length
    return len(room)


@given(LENGTHS, st.integers(1, 60))
def test_every_row_is_in_one_bin_and_no_bin_is_above_the_budget(lengths: list[int], capacity: int) -> None:
    bins = pack(lengths, capacity)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert all(len(rows) == 1 or sum(lengths[row] for row in rows) <= capacity for rows in bins)


@given(LENGTHS, st.integers(1, 60))
def test_it_wastes_no_more_than_first_fit(lengths: list[int], capacity: int) -> None:
    assert len(pack(lengths, capacity)) <= first_fit(lengths, capacity)


@given(LENGTHS, st.integers(1, 60))
def test_the_same_lengths_give_the_same_bins_in_order(lengths: list[int], capacity: int) -> None:
    bins = pack(lengths, capacity)
    assert bins == pack(list(lengths), capacity)
    assert all(rows == sorted(rows) for rows in bins)
    assert bins == sorted(bins)


def test_best_fit_decreasing_finds_what_first_fit_does_not() -> None:
    lengths = [3, 3, 2, 7, 5]
    assert pack(lengths, 10) == [[0, 3], [1, 2, 4]]
    assert first_fit(lengths, 10) == 3


def test_first_fit_is_taken_where_it_is_better() -> None:
    """Lengths in an order that first-fit happens to pack well; sorted, they take four bins."""
    lengths = [10, 11, 11, 8, 2, 7, 9, 2]
    assert len(pack(lengths, 20)) == first_fit(lengths, 20) == 3


def test_a_budget_holds_something() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        pack([1], 0)


def test_rows_stand_one_after_another_and_their_positions_start_again() -> None:
    batch = concatenate([example(4, 2), example(2)], first_position=2)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 1, 2]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[2, 3, 4, 5, 2, 3]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 3, 4, IGNORED, 2]]
    assert lengths_of(batch.attention_mask) == [4, 2]
    assert (batch.num_trained, batch.num_tokens) == (3, 6)
    assert set(batch.inputs()) == {"input_ids", "attention_mask", "position_ids"}
    rows, places = batch.ends()
    assert (rows.tolist(), places.tolist()) == ([0, 0], [3, 5])
    moved = batch.to("meta")
    assert moved.input_ids.is_meta
    assert not moved.attention_mask.is_meta  # read where it is made


def test_class_labels_stay_one_a_row() -> None:
    rows = [Example(array("i", [1, 2]), 2, "f", 1), Example(array("i", [1]), 0, "f", 2)]
    assert concatenate(rows).labels.tolist() == [2, 0]


@given(st.lists(st.tuples(*[st.integers(1, 6)] * 3), min_size=1, max_size=5))
def test_answers_are_the_same_tokens_after_the_same_places_packed_and_padded(sizes: list[tuple[int, int, int]]) -> None:
    """Both forms predict the same token of the same answer from a place that holds the same token at its position."""
    rows = [pair(*size) for size in sizes]
    told = []
    for batch in (collate(rows, pad_token=0), concatenate(rows)):
        assert batch.answers is not None
        places, tokens, owners = batch.answers
        assert batch.num_trained == len(rows)
        told.append((batch.input_ids.flatten()[places].tolist(), tokens.tolist(), owners.tolist()))
    assert told[0] == told[1]
    assert len(told[0][0]) == sum(chosen + rejected for _, chosen, rejected in sizes)


@given(st.lists(st.tuples(*[st.integers(1, 5)] * 3), min_size=1, max_size=3), st.sampled_from([None, 2]))
def test_a_pair_shares_its_prompt_and_nothing_else(sizes: list[tuple[int, int, int]], window: int | None) -> None:
    rows = [pair(*size) for size in sizes]
    batch = concatenate(rows)
    size = batch.num_tokens
    visible = allowed(batch.attention_mask, size=size, causal=True, window=window, device=torch.device("cpu"))
    seen = visible(None, None, torch.arange(size)[:, None], torch.arange(size)[None])
    expected, begin = torch.zeros(size, size, dtype=torch.bool), 0
    for prompt, chosen, rejected in sizes:
        own = list(range(begin, begin + prompt + chosen))
        other = own[:prompt] + list(range(begin + prompt + chosen, begin + prompt + chosen + rejected))
        for row in (own, other):
            for i, query in enumerate(row):
                for j, key in enumerate(row[: i + 1]):
                    expected[query, key] |= window is None or i - j < window
        begin += prompt + chosen + rejected
    assert seen.equal(expected)


def test_parts_of_a_step_hold_its_rows_and_no_more_tokens_than_padded_ones() -> None:
    rows = [example(length, start=10 * length) for length in (9, 2, 3, 8, 1, 2, 2, 4)]
    padded = micro_batches(rows, size=2, pad_token=0)
    packed = micro_batches(rows, size=2, pad_token=0, packed_from=0)
    assert len(packed) <= len(padded)
    assert max(part.input_ids.numel() for part in packed) <= max(part.input_ids.numel() for part in padded) == 18
    for parts in (padded, packed):
        assert sum(part.num_trained for part in parts) == sum(row.num_trained for row in rows)
        assert sum(part.num_tokens for part in parts) == 31
    assert padded_tokens(rows, size=2) == sum(part.input_ids.numel() for part in padded)
    pairs = [pair(2, 3, 4), pair(1, 1, 1)]
    assert padded_tokens(pairs, size=2) == collate(pairs, pad_token=0).input_ids.numel()
