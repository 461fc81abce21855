"""Riemannion: its steps, written densely."""

from __future__ import annotations

import pytest
import torch

from tests.optim.problems import choice, groups_of
from weft.errors import WeftError
from weft.optim import Pair, Setting, Trained

DENSE = {"rtol": 0.0, "atol": 1e-6}


@pytest.mark.parametrize("orthogonalise", [False, True])
def test_riemannion_moves_along_the_manifold_and_back_onto_it(orthogonalise):
    """The product of a pair, written densely: tangent, momentum carried over, SVD cut to the rank."""
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(7, 9, generator=draw, dtype=torch.float64)
    a, b = (torch.nn.Parameter(torch.randn(s, generator=draw, dtype=torch.float64)) for s in ((3, 9), (7, 3)))
    v, w = (torch.nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2))
    trained = [Trained("A", a), Trained("B", b), Trained("v", v)]
    chosen = choice("riemannion", momentum=0.8, orthogonalise=orthogonalise)
    optimizer = chosen.make(groups_of(trained, 0.1), Setting(trained, 0.1, pairs=[Pair(a, b)]))
    x, momentum, plain = (
        (b @ a).detach(),
        torch.zeros(7, 9, dtype=torch.float64),
        torch.optim.AdamW([w], 0.1, weight_decay=0),
    )
    for rate in (0.1, 0.05, 0.02, 0.05):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        ((b @ a - target).square().sum() + v.square().sum()).backward()
        w.grad, plain.param_groups[0]["lr"] = v.grad.clone(), rate
        plain.step()
        optimizer.step()
        left, size, right = torch.linalg.svd(x)
        rows, columns = right[:3].T @ right[:3], left[:, :3] @ left[:, :3].T

        def tangent(z, rows=rows, columns=columns):
            return columns @ z + z @ rows - columns @ z @ rows

        momentum = 0.8 * tangent(momentum) + 0.2 * tangent(2 * (x - target))
        step = momentum
        if orthogonalise:
            p, s, q = torch.linalg.svd(momentum, full_matrices=False)
            step = tangent(p @ torch.diag((s > 1e-9).double()) @ q)
        left, size, right = torch.linalg.svd(x - rate * step)
        x = (1 - 0.1 * rate) * left[:, :3] @ torch.diag(size[:3]) @ right[:3]
        torch.testing.assert_close((b @ a).detach(), x, **DENSE)
        torch.testing.assert_close(v, w, **DENSE)
        torch.testing.assert_close(a @ a.T, b.T @ b, **DENSE)


def test_riemannion_forgets_how_the_product_is_split_and_leaves_zero():
    moves = []
    for mix in (torch.eye(3), torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, 0.0], [1.0, 0.0, 3.0]])):
        draw, mix = torch.Generator().manual_seed(0), mix.double()
        a = torch.nn.Parameter(mix @ torch.randn(3, 6, generator=draw, dtype=torch.float64))
        b = torch.nn.Parameter(torch.randn(5, 3, generator=draw, dtype=torch.float64) @ torch.linalg.inv(mix))
        trained = [Trained("A", a), Trained("B", b)]
        optimizer = choice("riemannion").make(groups_of(trained), Setting(trained, pairs=[Pair(a, b)]))
        for _ in range(3):
            optimizer.zero_grad()
            ((b @ a) - 1).square().sum().backward()
            optimizer.step()
        moves.append((b @ a).detach())
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-6, atol=1e-9)
    a, b = torch.nn.Parameter(torch.randn(3, 6, dtype=torch.float64)), torch.nn.Parameter(torch.zeros(5, 3).double())
    trained = [Trained("A", a), Trained("B", b)]
    chosen = choice("riemannion", orthogonalise=False, momentum=0.0)
    optimizer = chosen.make(groups_of(trained), Setting(trained, pairs=[Pair(a, b)]))
    ((b @ a) - 1).square().sum().backward()
    wanted = 2e-3 * torch.ones(5, 6).double() @ torch.linalg.pinv(a.detach()) @ a.detach()
    optimizer.step()
    torch.testing.assert_close((b @ a).detach(), wanted, **DENSE)


def test_what_it_cannot_step_is_refused():
    a, b = torch.nn.Parameter(torch.randn(3, 6)), torch.nn.Parameter(torch.zeros(5, 3), requires_grad=False)
    trained = [Trained("A", a), Trained("B", b)]
    with pytest.raises(WeftError, match="freeze_a=false"):
        choice("riemannion").make(groups_of(trained), Setting(trained, pairs=[Pair(a, b)]))
    wide = torch.nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(WeftError, match="a matrix of 2 x 6 can have, and this update's is 3"):
        choice("riemannion").make(groups_of(trained), Setting(trained, pairs=[Pair(a, wide)]))
