"""What rules on singular vectors share, and what becomes of tensors that are no matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.combine.rule import Given, Rule
from weft.core import option

__all__ = ["Spectral", "orthonormal"]


@dataclass(frozen=True)
class Spectral(Rule):
    """W = W0 + l f(w_1 (W_1 - W0), ...) for matrices, with the mean of the differences for biases and gains.

    Kernels of convolutions count as matrices [O, I * kernel].
    """

    needs_base = True
    scale: float = option(1.0, help="factor on what is added (l)")

    @abstractmethod
    def merge(self, deltas: Tensor, given: Given) -> Tensor:
        """One matrix [O, I] of several, [K, O, I]."""

    def combine(self, tensors: Sequence[Tensor], given: Given) -> Tensor:
        deltas = torch.stack([w * (t - given.base) for w, t in zip(given.weights, tensors, strict=True)])
        if given.base.ndim < 2:
            return given.base + self.scale * deltas.mean(0)
        merged = self.merge(deltas.flatten(2), given).view(given.base.shape)
        return given.base + self.scale * merged


def orthonormal(m: Tensor) -> Tensor:
    """The matrix with orthonormal rows or columns that is nearest to m: the polar factor."""
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    return u @ v
