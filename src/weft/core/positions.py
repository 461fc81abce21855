"""Positions: where the tokens of a batch stand in the prompts of their rows, and where the prompts of a batch end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Positions", "labelled", "labels_told"]

_labels: list[Tensor | None] = [None]


@dataclass(frozen=True, eq=False)
class Positions:
    """For every token, how many tokens of its row's prompt stand before it, and how many after it, [B or 1, T].

    Negative: so far outside of the prompt (padding and virtual tokens in front of it, an answer behind it).
    real: which tokens are no padding, [B or 1, T]; None: all. causal: whether the model's tokens see earlier ones only.
    packed: whether a row holds several texts.
    """

    before: Tensor
    after: Tensor
    real: Tensor | None = None
    causal: bool = False
    packed: bool = False

    @classmethod
    def of_whole_rows(cls, x: Tensor) -> Positions:
        """Rows x [B, T, ...] that are prompts from end to end."""
        place = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        return cls(place, x.shape[1] - 1 - place)

    def first(self, count: int) -> Tensor:
        """Which are the first tokens of their prompt, [B or 1, T]: `count`, and at most its first half rounded down."""
        return (self.before >= 0) & (self.before < (self._length() // 2).clamp(max=count))

    def last(self, count: int) -> Tensor:
        """Which are the last tokens of their prompt, [B or 1, T]: `count`, and at most its second half rounded up."""
        return (self.after >= 0) & (self.after < (self._length() - self._length() // 2).clamp(max=count))

    def rows(self, where: Tensor) -> Positions:
        """Those of some rows of the batch."""

        def of(t: Tensor) -> Tensor:
            return t if t.shape[0] == 1 else t.index_select(0, where)

        return replace(
            self, before=of(self.before), after=of(self.after), real=None if self.real is None else of(self.real)
        )

    def _length(self) -> Tensor:
        return self.before + self.after + 1


@contextmanager
def labelled(labels: Tensor | None) -> Iterator[None]:
    """Say which tokens of the next batch the loss counts (labels [B, T], negative where it does not): the first of them
    is where a row's prompt ends. For losses that are made outside of the model, which is given no labels then."""
    before, _labels[0] = _labels[0], labels
    try:
        yield
    finally:
        _labels[0] = before


def labels_told() -> Tensor | None:
    """The labels that `labelled` tells, if any."""
    return _labels[0]
