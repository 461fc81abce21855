"""Single entries of a weight that are trained: which ones, a matrix of them, their gradients, others in their place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from weft.core.evolve import Part

__all__ = ["above_all", "added", "entries", "exchange", "gradient_at", "largest", "observe", "scattered"]

_SPARSE = 1 / 8  # share of entries below which their gradients one by one are cheaper than those of all


def largest(score: Tensor, count: int) -> Tensor:
    """Where the `count` largest numbers of a tensor stand, counted row after row, in order; [count] int32."""
    return score.flatten().topk(count, sorted=False).indices.sort().values.int()


def scattered(values: Tensor, places: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros but for `values` [..., K], added up at `places` [..., K], counted row after row: [..., *shape]."""
    size = torch.Size(shape)
    zeros = values.new_zeros(*values.shape[:-1], size.numel())
    return zeros.scatter_add(-1, places.long(), values).view(*values.shape[:-1], *size)


def entries(values: Tensor, places: Tensor, shape: Sequence[int]) -> dict[str, Tensor]:
    """Coefficients for `added`: the entries themselves while gradients are wanted, else a matrix that is made once."""
    if torch.is_grad_enabled():
        return {"values": values, "places": places}
    return {"S": scattered(values, places, shape)}


def added(c: Mapping[str, Tensor], x: Any, op: Any) -> Any:
    """(W + S) x + bias, from the coefficients that `entries` gives."""
    return op.with_delta(x, c["S"]) if "S" in c else op.with_entries(x, c["values"], c["places"])


def gradient_at(dy: Tensor, x: Tensor, places: Tensor) -> Tensor:
    """dy^T x of dy [N, O] and x [N, I], at `places` only, counted row after row: [K]."""
    rows, columns = dy.shape[1], x.shape[1]
    here = type(dy) is Tensor and dy.device.type == "cpu" and dy.dtype in (torch.float32, torch.float64)
    if not here or len(places) > _SPARSE * rows * columns:
        return (dy.mT @ x).flatten().index_select(0, places)
    order = None
    if not bool((places[1:] >= places[:-1]).all()):
        places, order = places.sort()
    starts = torch.searchsorted(places, torch.arange(rows + 1) * columns)
    _quiet()
    pattern = torch.sparse_csr_tensor(
        starts, places % columns, dy.new_zeros(len(places)), (rows, columns), check_invariants=False
    )
    # each entry is a product of two runs of N numbers
    across, down = dy.mT.contiguous(), x.mT.contiguous().mT
    found = torch.sparse.sampled_addmm(pattern, across, down, beta=0.0).values()
    return found if order is None else torch.empty_like(found).index_copy_(0, order, found)


@cache
def _quiet() -> None:
    """Torch says once that sparse tensors may still change: said here, where nobody is bothered."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = torch.zeros(1, dtype=torch.long)
        torch.sparse_csr_tensor(torch.tensor([0, 1]), index, torch.zeros(1), (1, 1), check_invariants=False)


def above_all(scores: Sequence[Tensor], share: float) -> list[Tensor]:
    """Masks of the largest numbers of several tensors together: `share` of all their entries, one at least."""
    flat = torch.cat([s.flatten() for s in scores])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.topk(max(1, round(share * len(flat))), sorted=False).indices] = True  # sorting takes most of the time
    parts = chosen.split([s.numel() for s in scores])
    return [m.view(s.shape) for m, s in zip(parts, scores, strict=True)]


def observe(part: Part) -> None:
    """Remember what the step's gradients say of entries that train, `values` at `places`, and of all others by them.

    Per row and column of the weight, SM3's bound on the sum of squared gradients (Anil et al. 2019, arXiv 1901.11150);
    for `candidates`, which are set back to zero, the sum of their gradients.
    """
    t, state = part.tensors, part.state
    rows, columns = part.site.out_features, math.prod(part.site.shape[1:])
    gradient, places = t["values"].grad, t["places"].long()
    assert gradient is not None, "the optimiser has just used it"
    down = state.setdefault("rows", gradient.new_zeros(rows))
    across = state.setdefault("columns", gradient.new_zeros(columns))
    squares = torch.minimum(down[places // columns], across[places % columns]) + gradient.square()
    down.scatter_reduce_(0, places // columns, squares, "amax")
    across.scatter_reduce_(0, places % columns, squares, "amax")
    if "candidates" in t:
        found = t["candidates"].grad
        assert found is not None, "likewise"
        state["sum"] = state["sum"] + found if "sum" in state else found.clone()
        t["candidates"].zero_()
        part.restart("candidates", torch.ones_like(t["candidates"], dtype=torch.bool))


def exchange(part: Part, count: int) -> None:
    """Drop the `count` trained entries that are nearest to zero for untrained ones, which start at zero.

    For the candidates with the largest sum of gradients, where the part has such; else for the entries with the largest
    estimate of their gradient's size, sqrt(row x column). New candidates are drawn with chances in proportion to it.
    """
    t, state = part.tensors, part.state
    values, places = t["values"], t["places"]
    dropped = values.abs().topk(count, largest=False).indices
    estimate = torch.outer(state["rows"].sqrt(), state["columns"].sqrt()).flatten().index_fill(0, places.long(), -1)
    if "candidates" in t:
        grown = t["candidate_places"][state["sum"].abs().topk(count).indices]
        estimate[grown.long()] = -1
        chance = (estimate + torch.finfo(estimate.dtype).tiny) / torch.empty_like(estimate).exponential_()
        t["candidate_places"].copy_(largest(chance, len(values)))
        state["sum"].zero_()
    else:
        grown = largest(estimate, count)
    places[dropped], values[dropped] = grown, 0
    part.restart("values", torch.zeros_like(values, dtype=torch.bool).index_fill(0, dropped, True))
