"""Putting adapters of a model under a router: they become its experts, and all of them one adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weft.attach import attach_plan, records, use
from weft.core.method import Frozen
from weft.core.router import Expert, Router
from weft.errors import AdapterError, nearest
from weft.fresh import Record
from weft.kinds.seat import Weave
from weft.patterns import walk
from weft.targets import Plan, PlannedSite, TargetError

__all__ = ["join"]


@torch.no_grad()
def join(
    model: nn.Module, router: Router, over: Sequence[str], *, name: str = "joined", train_experts: bool = False
) -> Plan:
    """Make one adapter of several that a model carries, weighed by a router, and use it; returns what it adapts.

    over: their names, which are those of the experts. Each counts at the sites that it adapts. They stay on the model
        as well, and where they are not trained no tensor is copied.
    train_experts: train copies of them along with the router; otherwise the router alone learns.
    Raises AdapterError for names that the model lacks, and TargetError for what the router cannot weigh.
    """
    known = records(model)
    for each in over:
        if each not in known:
            raise AdapterError(
                f"this model has no adapter {each!r}; {nearest(each, known) if known else 'it has none'}"
            )
    if router.experts:
        raise ValueError(f"{router.name} has experts already: leave them out, they are the adapters named by over")
    router = dataclasses.replace(router, train_experts=train_experts)
    together = {each: known[each] for each in over}
    try:
        plan = _plan(router, together, name)
    except ValueError as error:
        raise TargetError(str(error)) from error
    modules, tensors = dict(walk(model)), {}
    for planned in plan.sites:
        made = {n: _held(r.adapters[planned.site.address], train_experts) for n, r in together.items()
                if planned.site.address in r.adapters}  # fmt: skip
        method, seat = (
            planned.method,
            planned.offer.seat(modules[planned.path], planned.site, Weave(), planned.offer.param),
        )
        assert isinstance(method, Router), "it was put there"
        held = {n: together[n].adapters[planned.site.address].shared for n in made}
        shared = {n: holder.tensors() for n, holder in held.items() if holder is not None}
        tensors[planned.site.address] = method.started(planned.site, seat.start(), made, shared)
    attach_plan(model, plan, tensors=tensors, shared=_shared(plan, together, train_experts))
    use(model, name)
    return plan


def _plan(router: Router, together: dict[str, Record], name: str) -> Plan:
    """Every site of every adapter, with those that adapt it."""
    sites: dict[str, tuple[PlannedSite, list[Expert]]] = {}
    for each, record in together.items():
        for planned in record.plan.sites:
            sites.setdefault(planned.site.address, (planned, []))[1].append(Expert(each, planned.method))
    whole = dataclasses.replace(router, experts=tuple(Expert(n, r.plan.method) for n, r in together.items()))
    whole.check_experts()
    planned_sites = []
    for index, (planned, experts) in enumerate(sites.values()):
        if planned.site.kind not in router.kinds:
            raise ValueError(
                f"{planned.site.address} is of kind {planned.site.kind}, and {router.name} weighs adapters of "
                f"{', '.join(sorted(router.kinds))} only: a router of constant weights (blend) takes every kind"
            )
        site = dataclasses.replace(planned.site, index=index, count=len(sites))
        own = router.over(tuple(experts))
        own.check(site)
        planned_sites.append(PlannedSite(site, own, planned.path, planned.offer))
    return Plan(name, whole, tuple(planned_sites))


def _held(holder: nn.Module, train: bool) -> dict[str, Tensor | Frozen]:
    """A holder's own tensors: those that train as copies, the others as they are."""
    found: dict[str, Tensor | Frozen] = {}
    for key, p in holder._parameters.items():
        if p is not None:
            found[key] = p.detach().clone() if train else Frozen(p.detach())
    return found | {key: Frozen(b) for key, b in holder._buffers.items() if b is not None}


def _shared(plan: Plan, together: dict[str, Record], train: bool) -> dict[str, dict[str, Tensor | Frozen]]:
    """What each adapter's sites share, under its name, and what the router's do."""
    found = plan.shared()
    for own in found.values():
        for each, record in together.items():
            for holder in record.shared.values():
                for key, tensor in _held(holder, train).items():
                    if f"{each}:{key}" in own:
                        own[f"{each}:{key}"] = tensor
    return found
