"""Narrow maps in all their forms, and the gradients of single entries, against the matrices that they stand for."""

from __future__ import annotations

import pytest
import torch

from weft.core import narrow
from weft.core.entries import gradient_at

X = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FORMS = {
    "matrix": (torch.arange(36.0).double().view(3, 12), None),
    "blocks": (torch.arange(24.0).double().view(2, 2, 6), None),
    "channels": (torch.tensor([5, 0, 5]), torch.eye(12).double()[[5, 0, 5]]),
    "fold": (narrow.Fold(4), torch.eye(4).double().repeat(1, 3)),
}


@pytest.mark.parametrize("form", FORMS)
def test_reads_and_writes_as_its_matrix_does(form: str) -> None:
    m, dense = FORMS[form]
    if dense is None:
        dense = m if m.ndim == 2 else torch.block_diag(*m)  # type: ignore[union-attr]
    h = narrow.read(X, m)
    torch.testing.assert_close(h, dense @ X.mT)
    torch.testing.assert_close(narrow.spread_onto(X.clone(), h, m), X + h.mT @ dense)


def test_a_fold_is_seen_and_nothing_else_is() -> None:
    shards = torch.eye(4).repeat(1, 3)
    assert narrow.fold_of(shards) == narrow.Fold(4)
    for other in (shards[:, :10], shards + 1e-3 * torch.ones(4, 12).tril(-1), shards.clone().requires_grad_()):
        assert narrow.fold_of(other) is other


@pytest.mark.parametrize("places", [[3, 40, 80], [80, 3, 40, 3], [*range(50)]], ids=["few", "unsorted", "many"])
def test_gradients_at_places_are_those_of_the_matrix(places: list[int]) -> None:
    dy, at = torch.randn(7, 8, dtype=torch.float64), torch.tensor(places)
    torch.testing.assert_close(gradient_at(dy, X, at), (dy.mT @ X).flatten()[at])
