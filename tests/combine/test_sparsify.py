"""Which entries are the largest, also where many are equal, and what blocks of a sum add up to."""

from __future__ import annotations

import pytest
import torch

from weft.combine import consensus
from weft.combine.sparsify import by_size, largest, without_outliers

DRAWN = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 7, 1000, 1999, 2000, 2001])
def test_the_largest_are_those_of_topk(dtype, count) -> None:
    size = DRAWN.to(dtype).abs()
    found = largest(size, count)
    wanted = torch.zeros(2000, dtype=torch.bool)
    wanted[size.flatten().topk(min(count, 2000)).indices] = True
    assert torch.equal(found, wanted.view(40, 50))


def test_of_equal_entries_the_first_are_taken() -> None:
    size = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0, 2.0, 1.0])
    assert largest(size, 4).tolist() == [True, True, True, False, False, True, False]
    assert largest(torch.zeros(4), 2).tolist() == [True, True, False, False]
    coarse = DRAWN.to(torch.bfloat16).float()
    kept = by_size(coarse, 0.3)
    assert int(kept.sum()) == 600
    assert coarse[kept].abs().min() >= coarse[~kept].abs().max()


def test_outliers_are_left_out_and_the_next_largest_taken() -> None:
    order = DRAWN.abs().flatten().sort(descending=True).indices
    wanted = torch.zeros(2000, dtype=torch.bool)
    wanted[order[100:700]] = True
    assert torch.equal(without_outliers(DRAWN, 0.3, 0.05).flatten(), wanted)
    few = without_outliers(DRAWN, 0.99, 0.05)  # so many are kept that not all outliers can go
    assert int(few.sum()) == 1980
    assert not few.flatten()[order[:20]].any()


@pytest.mark.parametrize("elect", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
def test_blocks_add_up_to_the_same_bits(elect, normalise, monkeypatch) -> None:
    deltas = torch.randn(3, 11, 13, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([0.5, 1.0, 0.25])
    whole = consensus.added(deltas, weights, elect=elect, normalise=normalise)
    monkeypatch.setattr(consensus, "_BLOCK", 10)
    assert torch.equal(consensus.added(deltas, weights, elect=elect, normalise=normalise), whole)


def test_another_device_would_take_the_same(monkeypatch) -> None:
    """The way for tensors that numpy does not see, on a stand-in for them."""
    coarse = DRAWN.to(torch.bfloat16).float().abs()

    class Elsewhere:
        type = "elsewhere"

    wanted = largest(coarse, 600)
    monkeypatch.setattr(torch.Tensor, "device", Elsewhere(), raising=False)
    found = largest(coarse, 600)
    monkeypatch.undo()
    assert torch.equal(found, wanted)
