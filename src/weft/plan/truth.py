"""What a run really took: the highest point of memory, reset when it begins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

__all__ = ["Peak", "resident_bytes"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """The highest memory since it was made, above `baseline_bytes`.

    On a CPU of the process (Linux alone tells: elsewhere it is what is held when `bytes` is asked for), on an
    accelerator of torch's tensors.
    """

    def __init__(self, device: torch.device, baseline_bytes: int = 0):
        self.device, self.baseline = device, baseline_bytes
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):
                _CLEAR.write_text("5")  # resets the high-water mark

    def bytes(self) -> int:
        """The highest so far, above the baseline."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(_status("VmHWM", resident_bytes) - self.baseline, 0)


def resident_bytes() -> int:
    """Memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def _status(key: str, otherwise: Callable[[], int]) -> int:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return otherwise()
