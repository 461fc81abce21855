"""Which entries of small networks are worth keeping, found while they train: masks of their matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.core.evolve import Part
from weft.core.two_layers import largest

__all__ = ["SCORES", "prune", "snip", "synflow"]

Pair = tuple[Tensor, Tensor]
"""Down [R, C] and up [C', R] of one network."""

_ROUNDS = 100


def snip(pairs: Sequence[Pair], share: float) -> list[Pair]:
    """Masks of a share of all entries: those whose loss would change most without them, |w dL/dw|.

    Lee et al. 2018, arXiv 1810.02340.
    """
    return _best([((d * _slope(d)).abs(), (u * _slope(u)).abs()) for d, u in pairs], share)


def synflow(pairs: Sequence[Pair], share: float) -> list[Pair]:
    """Masks of a share of all entries: those through which most passes of 1^T |U| |D| 1, whatever the data.

    Found in rounds that each keep the same part of what is left, so that no matrix is emptied while others are full.
    Tanaka et al. 2020, arXiv 2006.05467.
    """
    sizes = [(d.abs(), u.abs()) for d, u in pairs]
    kept = [(torch.ones_like(d), torch.ones_like(u)) for d, u in sizes]
    for n in range(1, _ROUNDS + 1):
        scores = []
        for (d, u), (of_d, of_u) in zip(sizes, kept, strict=True):
            through = (d * of_d).sum(1), (u * of_u).sum(0)  # [R] each: what comes into a channel between, and out of it
            # what is out stays out: an entry with nothing on its other side has no flow either, and is not worse
            scores.append(((d * through[1].unsqueeze(-1)).where(of_d > 0, -1), (u * through[0]).where(of_u > 0, -1)))
        kept = _best(scores, share ** (n / _ROUNDS))
    return kept


SCORES = {"snip": snip, "synflow": synflow}
"""Scores that are found of networks that have trained for a while."""


def prune(parts: Sequence[Part], score: str, share: float) -> None:
    """Keep a share of the entries of all `down` and `up` together, by their masks; the others start anew."""
    masks = SCORES[score]([(part.tensors["down"], part.tensors["up"]) for part in parts], share)
    for part, both in zip(parts, masks, strict=True):
        for name, mask in zip(("down", "up"), both, strict=True):
            part.tensors[f"{name}_mask"].copy_(mask)
            part.restart(name, mask == 0)


def _slope(w: Tensor) -> Tensor:
    return torch.zeros_like(w) if w.grad is None else w.grad


def _best(scores: Sequence[Pair], share: float) -> list[Pair]:
    flat = [s.flatten() for both in scores for s in both]
    masks = iter(largest(torch.cat(flat), share).split([len(s) for s in flat]))
    return [(next(masks).view_as(d), next(masks).view_as(u)) for d, u in scores]
