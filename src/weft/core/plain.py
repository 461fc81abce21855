"""Whether a tensor is an ordinary one, which holds its numbers as they are."""

from __future__ import annotations

from torch import Tensor

__all__ = ["is_plain"]


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is no quantised or sharded one. A fake one, of a forecast, stands for an ordinary one."""
    return type(tensor) is Tensor or type(tensor).__name__ == "FakeTensor"
