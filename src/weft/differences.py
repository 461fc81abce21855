"""What an adapter changes at each site: two thin matrices where its body is made of such, else one dense matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.attach import records, weave_of
from weft.core.adapter import run
from weft.core.affine import NotLinear, WeightOp
from weft.core.factored import FactorOp, NotFactored, factors
from weft.core.site import Site
from weft.errors import AdapterError, nearest
from weft.kinds.experts import OneExpert
from weft.kinds.seat import Seat

__all__ = ["Difference", "difference", "differences", "flat", "with_kernel"]


@dataclass(frozen=True)
class Difference:
    """The change of one map, with a leading dimension E at fused experts.

    Either b [O, R] and a [R, I, *kernel], or dense [O, I, *kernel] ([C] at a norm). shift: of the bias, [O], or None.
    """

    site: Site
    b: Tensor | None = None
    a: Tensor | None = None
    dense: Tensor | None = None
    shift: Tensor | None = None

    @property
    def factored(self) -> bool:
        """Whether it is held as two thin matrices."""
        return self.b is not None

    def weight(self) -> Tensor:
        """The change as a dense matrix."""
        if self.b is None or self.a is None:
            assert self.dense is not None, "a difference has one of two forms"
            return self.dense
        return with_kernel(self.b @ flat(self.a, self.site), self.site)


def flat(m: Tensor, site: Site) -> Tensor:
    """[..., R, I, *kernel] as a matrix [..., R, I * kernel]."""
    return m.flatten(-1 - len(site.kernel_size)) if site.kernel_size else m


def with_kernel(m: Tensor, site: Site) -> Tensor:
    """The inverse of `flat`."""
    return m.unflatten(-1, (-1, *site.kernel_size)) if site.kernel_size else m


@torch.no_grad()
def differences(model: nn.Module, name: str) -> dict[str, Difference]:
    """What an adapter of a model changes, by address.

    Raises AdapterError for an adapter that no weight can express, with the reason.
    """
    seats, known = weave_of(model).seats, records(model)
    if name not in known:
        raise AdapterError(f"this model has no adapter {name!r}; {nearest(name, known)}")
    return {address: difference(seats[address], name) for address in known[name].adapters}


def difference(seat: Seat, name: str, *, graph: bool = False) -> Difference:
    """What an adapter changes at one seat; AdapterError where no weight can express it.

    graph: whether gradients flow from it to the adapter's tensors.
    """
    try:
        with torch.set_grad_enabled(graph):
            return _of(seat, name)
    except (NotLinear, TypeError) as error:
        method = seat.adapters[name].method.name
        raise AdapterError(
            f"{seat.site.address}: {method} changes no weight that could be combined: {error}; use it in a route"
        ) from error


def _of(seat: Seat, name: str) -> Difference:
    try:
        b, a, *shift = _factors(seat, name)
    except NotFactored:
        value, weight, bias = seat.value(name), seat.weight(), seat.bias()
        shift_of = None if value.bias is None else value.bias - (0 if bias is None else bias)
        if shift_of is not None and not shift_of.any():
            shift_of = None
        return Difference(seat.site, dense=value.dense(weight) - weight, shift=shift_of)
    return Difference(seat.site, b=b, a=a, shift=shift[0] if shift else None)


def _factors(seat: Seat, name: str) -> tuple[Tensor, ...]:
    adapter, weight, bias = seat.adapters[name], seat.weight(), seat.bias()

    def one(holder: Any, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        op = FactorOp(seat.site, WeightOp(seat.site, w, b))
        method = holder.method
        tensors = holder.tensors() if callable(holder.tensors) else holder.tensors
        found = run(method, method.coefficients(tensors, op.inner), op.input(), op)
        return tuple(t for t in factors(found) if t is not None)

    if seat.site.experts is None:
        return one(adapter, weight, bias)
    own = {**adapter._parameters, **adapter._buffers}
    return torch.vmap(lambda t, w, b: one(OneExpert(adapter, t), w, b), in_dims=(0, 0, None if bias is None else 0))(
        own, weight, bias
    )
