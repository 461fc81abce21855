"""The batch reading: every row of a batch has its own adapter; coefficients are stacked and an index picks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.core.adapter import OpView
from weft.core.op import DataOp, _cast

GATHERED_ROWS = 64
"""A coefficient with more rows than this is not copied per batch row: its rows are sorted into segments instead."""


class Gather(OpView):
    """Verbs with stacked coefficients [K, ...]; row i of the input uses number ids[i].

    The frozen map runs once for all rows. Verbs are the plain op's, mapped over rows; on activations [B, T, C] they are
    batched matmuls.
    """

    def __init__(self, inner: DataOp, ids: Tensor):
        super().__init__(inner)
        self.ids = ids
        self.flat = type(inner) is DataOp

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        return self._matmul(x, a) if self.flat else self._map("project", x, a)

    def expand(self, h: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
        if self.flat and onto is not None and h.ndim == 3 and b.shape[2] <= GATHERED_ROWS and onto.dtype == h.dtype:
            return torch.baddbmm(onto, h, _cast(b, h)[self.ids].mT)
        y = self._matmul(h, b) if self.flat else self._map("expand", h, b)
        return y if onto is None else onto + y

    def scale(self, y: Tensor, g: Tensor) -> Tensor:
        return y * self._per_row(y, g) if self.flat else self._map("scale", y, g)

    def shift(self, y: Tensor, b: Tensor) -> Tensor:
        if b.ndim == 1:  # the module's own bias, taken off for a method that must not see it: the same for all rows
            return self.inner.shift(y, b)
        return y + self._per_row(y, b) if self.flat else self._map("shift", y, b)

    def rotate(self, x: Tensor, q: Tensor) -> Tensor:
        return self._map("rotate", x, q)

    def permute(self, x: Tensor, order: Tensor) -> Tensor:
        return self._map("permute", x, order)

    def _map(self, verb: str, x: Tensor, c: Tensor) -> Tensor:
        return torch.vmap(getattr(self.inner, verb))(x, c[self.ids])

    def _per_row(self, y: Tensor, v: Tensor) -> Tensor:
        v = _cast(v, y)[self.ids]  # [B, C]
        return v.reshape(v.shape[0], *[1] * (y.ndim - 2), v.shape[1])

    def _matmul(self, x: Tensor, a: Tensor) -> Tensor:
        """x [B, ..., I] with row i meeting a[ids[i]] [R, I]."""
        a = _cast(a, x)
        if min(a.shape[1:]) > GATHERED_ROWS:
            return self._by_segments(x, a)
        rows = x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)  # [B, T, I]
        y = torch.bmm(rows, a[self.ids].mT)
        return y.view(*x.shape[:-1], a.shape[1])

    def _by_segments(self, x: Tensor, a: Tensor) -> Tensor:
        order = self.ids.argsort(stable=True)
        sizes = torch.bincount(self.ids, minlength=a.shape[0]).tolist()
        parts = [F.linear(part, a[k]) for k, part in enumerate(x[order].split(sizes)) if len(part)]
        return torch.cat(parts)[order.argsort()]
