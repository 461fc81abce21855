"""The same adapter with other options of its method: for what comes after a training that needed the first ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.attach import attach_plan, records, use
from weft.core.method import Frozen, Method
from weft.errors import AdapterError, nearest
from weft.kinds.seat import Weave
from weft.patterns import walk
from weft.targets import Plan

__all__ = ["changed"]


@torch.no_grad()
def changed(model: nn.Module, source: str, options: Mapping[str, Any], *, name: str, fresh: Sequence[str] = ()) -> Plan:
    """Put an adapter on a model that is another one of it with other options, and use it; returns what it adapts.

    Tensors that both have in one shape are copied, all others start anew, and so do those that `fresh` names. Whether
    they train is as the new options say. Raises AdapterError for an adapter that the model lacks, and ValueError for
    an option or a tensor that the method lacks, or that does not fit.
    """
    known = records(model)
    if source not in known:
        raise AdapterError(
            f"this model has no adapter {source!r}; {nearest(source, known) if known else 'it has none'}"
        )
    record, modules = known[source], dict(walk(model))
    sites = tuple(dataclasses.replace(p, method=_with(p.method, options)) for p in record.plan.sites)
    plan = Plan(name, _with(record.plan.method, options), sites, record.plan.targets, record.plan.tied)
    for planned in plan.sites:
        planned.method.check(planned.site)
    ops = {p.site.address: p.offer.seat(modules[p.path], p.site, Weave(), p.offer.param).start() for p in plan.sites}
    tensors = {
        p.site.address: _carried(p.method.init(p.site, ops[p.site.address]), record.adapters[p.site.address], fresh)
        for p in plan.sites
    }
    shared = {key: _carried(start, record.shared.get(key), fresh) for key, start in plan.shared(ops=ops).items()}
    seen = {key for holder in (*record.adapters.values(), *record.shared.values()) for key in _tensors(holder)}
    if unknown := [each for each in fresh if each not in seen]:
        raise ValueError(f"fresh={', '.join(unknown)}: {source!r} has no such tensor; {nearest(unknown[0], seen)}")
    attach_plan(model, plan, tensors=tensors, shared=shared)
    use(model, name)
    return plan


def _with(method: Method, options: Mapping[str, Any]) -> Method:
    """The method with these options; ValueError for one that it lacks."""
    names = [f.name for f in dataclasses.fields(method)]
    for option in options:
        if option not in names:
            raise ValueError(f"{method.name} has no option {option!r}; {nearest(option, names)}")
    return dataclasses.replace(method, **options)


def _carried(
    start: Mapping[str, Tensor | Frozen], holder: nn.Module | None, fresh: Sequence[str]
) -> dict[str, Tensor | Frozen]:
    """The start with a holder's tensors in it, where they fit."""
    old = {} if holder is None else _tensors(holder)
    found: dict[str, Tensor | Frozen] = {}
    for key, value in start.items():
        begin = value.tensor if isinstance(value, Frozen) else value
        fits = key in old and old[key].shape == begin.shape and key not in fresh
        tensor = old[key].detach().clone() if fits else begin
        found[key] = Frozen(tensor) if isinstance(value, Frozen) else tensor
    return found


def _tensors(holder: nn.Module) -> dict[str, Tensor]:
    both = {**holder._parameters, **holder._buffers}
    return {key: tensor for key, tensor in both.items() if tensor is not None}
