"""What the C library's allocator keeps of memory that was given back, which no forecast of tensors can know."""

from __future__ import annotations

import os
import platform

__all__ = ["ALLOCATOR_NOTE", "kept_share"]

_SHARE = 0.5  # of what is neither weights nor libraries; measured: 0.21 to 0.75, median 0.45, more in longer runs
_TIGHT = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
_TIGHT_BYTES = 1 << 20  # below, pages of tensors go back to the system when these are freed
_OTHERS = ("jemalloc", "tcmalloc", "mimalloc")
ALLOCATOR_NOTE = (
    "allocator: glibc keeps part of what tensors give back, 20 to 75 % of what is neither weights nor libraries in "
    "measured runs; half of that is counted until past runs correct it"
)


def kept_share() -> float:
    """How much more than its tensors a training process holds on a CPU, as a share of them.

    0 where the allocator is another than glibc's own, or was told by the environment to give memory back at once.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ.get("LD_PRELOAD", "") for name in _OTHERS):
        return 0.0
    return 0.0 if all(_bytes(os.environ.get(name, "")) <= _TIGHT_BYTES for name in _TIGHT) else _SHARE


def _bytes(text: str) -> float:
    """A setting; no number: it is not set."""
    return int(text) if text.isdecimal() else float("inf")
