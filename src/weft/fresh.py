"""Making adapters: every site's tensors for a plan, fresh from the methods or out of a file; no model is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.core.adapter import Adapter, Shared
from weft.core.affine import StartOp
from weft.core.method import Frozen, Method
from weft.kinds.seat import Weave
from weft.targets import Plan, PlannedSite

__all__ = ["Record", "make"]


@dataclass(eq=False)
class Record:
    """One named adapter of a model: its plan and its tensors by site."""

    plan: Plan
    adapters: dict[str, Adapter]
    shared: dict[str, Shared]


@torch.no_grad()
def make(
    plan: Plan,
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Mapping[str, Tensor | Frozen]] | None,
    shared: Mapping[str, Mapping[str, Tensor | Frozen]] | None,
    statistics: Mapping[str, Mapping[str, Tensor]],
) -> Record:
    """Every adapter of a plan, not yet attached."""
    holders: dict[str, Shared] = {}
    for method in {s.method.name: s.method for s in plan.sites}.values():
        if type(method).shared is not Method.shared:
            ready = (shared or {}).get(method.name)
            if ready is None:
                ready = method.shared([s.site for s in plan.sites if s.method.name == method.name])
            holders[method.name] = Shared(ready)
    made = {}
    for planned in plan.sites:
        site, method = planned.site, planned.method
        if tensors is not None:
            own = tensors[site.address]
        else:
            own = fresh(planned, modules[planned.path], statistics.get(site.address))
        made[site.address] = Adapter(method, site, own, holders.get(method.name))
    return Record(plan, made, holders)


def fresh(
    planned: PlannedSite, module: nn.Module, statistics: Mapping[str, Tensor] | None = None
) -> Mapping[str, Tensor | Frozen]:
    """A method's initial tensors at a site; one set per expert, stacked, where the site holds several."""
    site, method = planned.site, planned.method
    seat = planned.offer.seat(module, site, Weave(), planned.offer.param)
    if site.experts is None:
        return method.init(site, seat.start(statistics))
    each = []
    gradient = (statistics or {}).get("gradient")  # [E, O, I]; inputs are not told apart by expert
    for e, weight in enumerate(seat.weight()):
        one = dataclasses.replace(site, address=f"{site.address}.{e}", experts=None)
        known = {} if gradient is None else {"gradient": gradient[e]}
        each.append(method.init(one, StartOp(one, lambda w=weight: w, statistics=known)))  # type: ignore[misc]
    return {k: _stack([t[k] for t in each]) for k in each[0]}


def _stack(values: list[Tensor | Frozen]) -> Tensor | Frozen:
    if isinstance(values[0], Frozen):
        return Frozen(torch.stack([v.tensor for v in values]))  # type: ignore[union-attr]
    return torch.stack(values)  # type: ignore[arg-type]
