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

__all__ = ["Record", "dealt", "fresh", "make"]


@dataclass(eq=False)
class Record:
    """One named adapter of a model: its plan and its tensors by site."""

    plan: Plan
    adapters: dict[str, Adapter]
    shared: dict[str, Shared]


@torch.no_grad()
def dealt(plan: Plan, modules: Mapping[str, nn.Module], statistics: Mapping[str, Mapping[str, Tensor]]) -> Plan:
    """The plan with what sites compete for dealt out by what data says of them; some sites may go without."""
    by_method: dict[Method, list[PlannedSite]] = {}
    for planned in plan.sites:
        by_method.setdefault(planned.method, []).append(planned)
    chosen: dict[str, Method | None] = {}
    for method, sites in by_method.items():
        if type(method).deal is Method.deal or any(p.site.device == torch.device("meta") for p in sites):
            chosen |= {p.site.address: method for p in sites}
            continue
        ops = [
            p.offer.seat(modules[p.path], p.site, Weave(), p.offer.param).start(statistics.get(p.site.address))
            for p in sites
        ]
        found = method.deal([p.site for p in sites], ops)
        chosen |= {p.site.address: m for p, m in zip(sites, found, strict=True)}
    kept = [(p, chosen[p.site.address]) for p in plan.sites]
    return dataclasses.replace(
        plan, sites=tuple(p if m is p.method else dataclasses.replace(p, method=m) for p, m in kept if m is not None)
    )


@torch.no_grad()
def make(
    plan: Plan,
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Mapping[str, Tensor | Frozen]] | None,
    shared: Mapping[str, Mapping[str, Tensor | Frozen]] | None,
    statistics: Mapping[str, Mapping[str, Tensor]],
) -> Record:
    """Every adapter of a plan, not yet attached."""
    ready = plan.shared(ops=_ops(plan, modules)) if shared is None else shared
    holders = {name: Shared(found) for name, found in ready.items()}
    made = {}
    for planned in plan.sites:
        site, method = planned.site, planned.method
        if tensors is not None:
            own = tensors[site.address]
        else:
            own = fresh(planned, modules[planned.path], statistics.get(site.address))
        made[site.address] = Adapter(method, site, own, holders.get(method.name))
    return Record(plan, made, holders)


def _ops(plan: Plan, modules: Mapping[str, nn.Module]) -> dict[str, StartOp]:
    """What every site that shares something starts from; weights are read when asked for."""
    sharing = [p for p in plan.sites if p.method.shares()]
    return {p.site.address: p.offer.seat(modules[p.path], p.site, Weave(), p.offer.param).start() for p in sharing}


def fresh(
    planned: PlannedSite, module: nn.Module, statistics: Mapping[str, Tensor] | None = None
) -> Mapping[str, Tensor | Frozen]:
    """A method's initial tensors at a site; one set per expert, stacked, where the site holds several."""
    site, method = planned.site, planned.method
    seat = planned.offer.seat(module, site, Weave(), planned.offer.param)
    if site.experts is None:
        return method.init(site, seat.start(statistics))
    each = []
    by_expert = {k: v for k, v in (statistics or {}).items() if k in ("gradient", "curvature")}  # inputs are not
    for e, weight in enumerate(seat.weight()):
        one = dataclasses.replace(site, address=f"{site.address}.{e}", experts=None)
        known = {k: v[e] for k, v in by_expert.items()}
        each.append(method.init(one, StartOp(one, lambda w=weight: w, statistics=known)))  # type: ignore[misc]
    return {k: _stack([t[k] for t in each]) for k in each[0]}


def _stack(values: list[Tensor | Frozen]) -> Tensor | Frozen:
    if isinstance(values[0], Frozen):
        return Frozen(torch.stack([v.tensor for v in values]))  # type: ignore[union-attr]
    return torch.stack(values)  # type: ignore[arg-type]
