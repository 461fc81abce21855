"""The mean of several adapters' parameters, name by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.core.method import Tensors

__all__ = ["check_means", "means"]


def check_means(parts: Sequence[Tensors]) -> None:
    """ValueError for whole numbers, such as the places of entries, that are not the same in all parts."""
    first, *others = parts
    for name, tensor in first.items():
        whole = not (tensor.is_floating_point() or tensor.is_meta)
        if whole and any(not torch.equal(tensor, other[name]) for other in others):
            raise ValueError(f"the {name} of these experts differ, and whole numbers have no mean")


def means(parts: Sequence[Tensors]) -> dict[str, Tensor]:
    """The means of floating tensors, and the others as they are in all parts."""
    return {
        name: torch.stack([part[name] for part in parts]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in parts[0].items()
    }
