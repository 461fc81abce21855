"""Tensors made ahead by threads: in order, not too many at once, and what raises ends the rest."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from weft.checkpoints import jobs
from weft.checkpoints.jobs import Job, in_order, scratch


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_several_threads_make_what_comes_in_order(three_threads, monkeypatch):
    monkeypatch.setattr(jobs, "_AT_ONCE", 100)
    together = threading.Barrier(3, timeout=20)  # broken, and an error, unless three are made at once
    seen: set[tuple[int, int]] = set()

    def make(i: int) -> torch.Tensor:
        seen.add((threading.get_ident(), torch.get_num_threads()))
        together.wait()
        return torch.tensor([float(i)])

    found = [float(piece) for piece in in_order(Job(1, partial(make, i)) for i in range(12))]
    assert found == [float(i) for i in range(12)]
    assert len({thread for thread, _ in seen}) == 3
    assert {torch_threads for _, torch_threads in seen} == {1}
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("entries", "most"), [(10, 10), (4, 2)])
def test_no_more_entries_are_under_way_than_the_largest_job_has(three_threads, monkeypatch, entries, most):
    monkeypatch.setattr(jobs, "_AT_ONCE", 10)
    lock, under_way, peak = threading.Lock(), 0, 0

    def begun() -> None:
        nonlocal under_way, peak
        with lock:
            under_way += entries
            peak = max(peak, under_way)

    def make() -> torch.Tensor:
        begun()
        return torch.zeros(entries)

    for _ in in_order(Job(entries, make) for _ in range(20)):
        with lock:
            under_way -= entries
    assert 0 < peak <= most * entries if entries < 10 else peak == 10


def test_what_raises_ends_the_rest_and_leaves_the_settings(three_threads):
    made: list[int] = []

    def make(i: int) -> torch.Tensor:
        if i == 5:
            raise ValueError("the sixth cannot be made")
        made.append(i)
        return torch.zeros(1)

    with pytest.raises(ValueError, match="the sixth"):
        list(in_order(Job(1, partial(make, i)) for i in range(1000)))
    assert max(made) < 20
    assert torch.get_num_threads() == 3


def test_scratch_is_the_same_memory_in_a_thread_and_another_in_the_next():
    mine = scratch("raw", 8, torch.float32)
    assert scratch("raw", 8, torch.float32) is mine
    assert scratch("wide", 8, torch.float32) is not mine
    others: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: others.append(scratch("raw", 8, torch.float32)))
    thread.start()
    thread.join()
    assert others[0].data_ptr() != mine.data_ptr()
