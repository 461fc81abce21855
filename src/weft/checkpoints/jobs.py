"""Tensors made by several threads and handed over in order, in memory of a few of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Job", "in_order", "scratch"]

_AT_ONCE = 1 << 23
"""Entries that may be made at once, unless one tensor has more: 32 MB of float32 for each model."""


_KEPT = threading.local()


@dataclass(frozen=True)
class Job:
    """What makes a tensor of so many entries."""

    num_entries: int
    make: Callable[[], Tensor]


def in_order(jobs: Iterable[Job]) -> Generator[Tensor, None, None]:
    """What the jobs make, in their order. As many threads as torch uses work ahead, each on a job of its own.

    Several jobs are under way only while they have no more entries together than the largest one so far, or than a
    constant. A job that raises ends the rest.
    """
    threads = torch.get_num_threads()
    waiting: deque[tuple[int, Future[Tensor]]] = deque()
    largest, ahead = _AT_ONCE, 0
    # One thread to a job: torch's own threads would wait for each other after every operation on a small piece, which
    # on a busy machine takes many times as long as the operation. The setting holds for the thread that makes it.
    pool = ThreadPoolExecutor(threads, "weft-merge", torch.set_num_threads, (1,))
    try:
        for job in jobs:
            largest = max(largest, job.num_entries)
            while waiting and (len(waiting) > threads or ahead + job.num_entries > largest):
                ahead -= waiting[0][0]
                yield waiting.popleft()[1].result()
            waiting.append((job.num_entries, pool.submit(job.make)))
            ahead += job.num_entries
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # for threads that begin later


def scratch(use: str, numel: int, dtype: torch.dtype) -> Tensor:
    """Memory for one use in this thread, the same at every call: fresh memory costs a fault for each page."""
    key = f"{use}, {numel} of {dtype}"
    if key not in _KEPT.__dict__:
        _KEPT.__dict__[key] = torch.empty(numel, dtype=dtype)
    kept: Tensor = _KEPT.__dict__[key]
    return kept
