"""Bottleneck adapters averaged unit by unit: the hidden units of each are moved onto those of the first beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.attach import attach_plan, records
from weft.combine import RuleError, rules
from weft.combining import Combination
from weft.core.adapter import Adapter
from weft.core.method import Frozen, Method
from weft.errors import AdapterError, missing_extra, nearest
from weft.targets import Plan

__all__ = ["Aligned", "combine_aligned"]

_UNITS = {"down": 0, "down_bias": 0, "up": 1}  # the dimension that hidden units are along
_SIZES = ("width", "reduction_factor")  # options that adapters may differ in


@dataclass(frozen=True)
class Aligned:
    """What was made. distances: by address, the mean squared distance between units that were put together, before and
    after, over all adapters but the first."""

    plan: Plan
    parents: Mapping[str, float]
    distances: Mapping[str, tuple[float, float]]

    def as_combination(self) -> Combination:
        """The same as what `weft.combine` returns."""
        before, after = (sum(d[i] for d in self.distances.values()) / len(self.distances) for i in (0, 1))
        note = f"squared distance between the hidden units averaged: {after:.4g}, {before:.4g} without aligning them"
        return Combination(self.plan, rules()["linear"](), self.parents, {}, note)


@torch.no_grad()
def combine_aligned(model: nn.Module, adapters: Mapping[str, float] | Sequence[str], *, name: str) -> Aligned:
    """Put a new adapter on a model that is the mean of bottleneck adapters which it carries, aligned by their weights.

    The order of hidden units means nothing, so a mean of adapters as they stand mixes units with nothing in common. At
    each site the units of every adapter, (row of D, entry of d, column of U), are moved onto those of the first one by
    the optimal transport plan between both sets, of which every unit has the same share; the sizes may differ, and the
    first one's is that of the result. He et al. 2023 (MerA), arXiv 2308.15982, who tune the result on a few rows then.

    adapters: {name: weight}, or names that weigh the same. Raises MissingExtra without POT, RuleError for weights whose
    sum is 0, AdapterError for adapters that are no bottlenecks of one kind at the same sites.
    """
    parents = dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    shares = _shares(model, parents)
    known = records(model)
    first, *others = parents
    made: dict[str, dict[str, Tensor | Frozen]] = {}
    distances = {}
    for address, reference in known[first].adapters.items():
        own = reference.tensors()
        mean = {key: shares[first] * t.float() for key, t in own.items()}
        met = torch.zeros(2)
        for other in others:
            moved, before, after = _moved(own, known[other].adapters[address].tensors(), address)
            met += torch.tensor([before, after]) / len(others)
            for key in mean:
                mean[key] += shares[other] * moved[key]
        made[address] = {key: _as(reference, key, t.to(own[key].dtype)) for key, t in mean.items()}
        distances[address] = (float(met[0]), float(met[1]))
    plan = dataclasses.replace(known[first].plan, name=name)
    attach_plan(model, plan, tensors=made)
    return Aligned(plan, parents, distances)


def _as(reference: Adapter, key: str, tensor: Tensor) -> Tensor | Frozen:
    return Frozen(tensor) if key in reference._buffers else tensor


def _moved(
    reference: Mapping[str, Tensor], other: Mapping[str, Tensor], address: str
) -> tuple[dict[str, Tensor], float, float]:
    """Another adapter's tensors over the reference's units, and how far its units were from those, before and after."""
    rest = {key: t.float() for key, t in other.items() if key not in _UNITS}
    for key, t in rest.items():
        if t.shape != reference[key].shape:
            raise AdapterError(
                f"{address}: {key} is {tuple(t.shape)} in one adapter and {tuple(reference[key].shape)} in another"
            )
    cost = torch.cdist(_units(reference), _units(other)).square()  # [R, R']
    plan = _plan(cost)  # rows add up to 1 / R, columns to 1 / R'
    of_rows, of_columns = plan * len(plan), plan * plan.shape[1]  # each unit is a mean; each unit is given away whole
    inner = {key: of_rows @ other[key].float() for key in ("down", "down_bias") if key in other}
    both = min(cost.shape)
    before = float(cost[:both, :both].diagonal().mean())
    return {**rest, **inner, "up": other["up"].float() @ of_columns.T}, before, float((plan * cost).sum())


def _units(t: Mapping[str, Tensor]) -> Tensor:
    """Every hidden unit as one vector [R, I + 1 + O]."""
    return torch.cat(
        [t[key].float().movedim(dim, 0).reshape(t["down"].shape[0], -1) for key, dim in _UNITS.items() if key in t], 1
    )


def _plan(cost: Tensor) -> Tensor:
    """The transport plan [R, R'] of least cost between units that all have the same share."""
    try:
        import ot
    except ImportError as error:
        raise missing_extra("transport", needs="POT") from error
    uniform = [torch.full((n,), 1 / n, dtype=torch.float64) for n in cost.shape]
    return ot.emd(*uniform, cost.double().cpu()).to(cost)


def _shares(model: nn.Module, parents: Mapping[str, float]) -> dict[str, float]:
    known = records(model)
    for name in parents:
        if name not in known:
            raise AdapterError(
                f"this model has no adapter {name!r}; {nearest(name, known) if known else 'it has none'}"
            )
    total = sum(parents.values())
    if not parents or total == 0:
        raise RuleError("a mean needs one adapter or more, and weights that do not add up to 0")
    first, *others = parents
    for name in others:
        _same_kind(first, known[first].adapters, name, known[name].adapters)
    for address, adapter in known[first].adapters.items():
        if not {"down", "up"} <= adapter.tensors().keys() or adapter.shared is not None:
            raise AdapterError(f"{address}: {adapter.method.name} has no hidden units of its own that could be aligned")
    return {name: weight / total for name, weight in parents.items()}


def _same_kind(first: str, ours: Mapping[str, Adapter], name: str, theirs: Mapping[str, Adapter]) -> None:
    if ours.keys() != theirs.keys():
        only = sorted(ours.keys() ^ theirs.keys())
        raise AdapterError(f"{first} and {name} are to be averaged, and one of them alone adapts {', '.join(only[:3])}")
    for address in ours:
        a, b = ours[address].method, theirs[address].method
        if _spec(a) != _spec(b):
            raise AdapterError(f"{address}: a mean of {a} and {b} is neither; only the width may differ")


def _spec(method: Method) -> tuple[str, dict[str, object]]:
    return method.name, {k: v for k, v in dataclasses.asdict(method).items() if k not in _SIZES}
