"""What an adapter adds to its map, as two matrices: read from the body of any method that is linear in its input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.core.adapter import run
from weft.core.affine import Affine, WeightOp
from weft.core.factored import FactorOp, Unread, factors
from weft.core.method import Method, Tensors
from weft.core.site import Site
from weft.core.thin import singular

__all__ = ["direction", "update"]


@torch.no_grad()
def update(method: Method, tensors: Tensors, site: Site, op: WeightOp) -> tuple[Tensor, Tensor]:
    """b [O, R] and a [R, I] of the update b a of a linear map: thin where the body is a sum of such pairs.

    Otherwise they are the whole matrix and the identity. NotLinear where no matrix is what the body adds.

    tensors: all that the method sees at the site.
    """
    c = method.coefficients(tensors, op)
    try:
        b, a, _ = factors(run(method, c, Unread(), FactorOp(site, op)))
        return b, a
    except TypeError:  # not as pairs: NotFactored, or a verb that they have not
        found: Affine = run(method, c, op.input(), op)
        weight = op.weight()
        delta = found.dense(weight) - weight
        return delta, torch.eye(delta.shape[1], dtype=delta.dtype, device=delta.device)


@torch.no_grad()
def direction(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The first right singular vector [I] of the sum of all b a, up to its sign.

    Where that sum is zero, as at most starts, it is that of the thin a's: the direction of inputs that is read most. It
    is zeros where there are none.
    """
    b, a = (torch.cat(each, dim) for each, dim in zip(zip(*pairs, strict=True), (1, 0), strict=True))
    _, s, v = singular(b, a)
    if s[0] > 0:
        return v[0]
    return torch.linalg.svd(a, full_matrices=False)[2][0] if a.shape[0] < a.shape[1] else torch.zeros_like(a[0])
