"""Adapters made of adapters: a rule over what each of them changes, written as an adapter again at a stated loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from weft.attach import attach_plan, records, weave_of
from weft.combine import Rule, RuleError, rules
from weft.core.method import Frozen, Method
from weft.core.site import Site
from weft.core.thin import nearest as nearest_of_rank
from weft.core.thin import rank_for, singular
from weft.differences import Difference, difference, flat, with_kernel
from weft.errors import AdapterError, nearest
from weft.registry import method_from_spec
from weft.targets import Plan

__all__ = ["Combination", "Weight", "combine", "rule_of", "said_weight"]

Weight = float | Mapping[str, float]
"""What an adapter counts: one number, or one for each address."""

_Spectrum = tuple[Tensor, Tensor, Tensor]  # U [..., O, R], s [..., N], V [..., R, I]
_AT_ONCE = 32  # sites that are decomposed together
_ROUNDING = 1e-6  # of a matrix's norm: what a sum of low-rank matrices may lose where its rank is smaller than theirs


@dataclass(frozen=True)
class Combination:
    """What was made. losses: by address, what part of the combined change's norm the adapter lacks; note: more."""

    plan: Plan
    rule: Rule
    parents: Mapping[str, Weight]
    losses: Mapping[str, float]
    note: str = ""

    @property
    def loss(self) -> float:
        """The largest loss at a site."""
        return max(self.losses.values(), default=0.0)

    def __str__(self) -> str:
        parts = ", ".join(f"{said_weight(weight)} x {name}" for name, weight in self.parents.items())
        worst = max(self.losses, key=lambda address: self.losses[address], default="")
        lost = f"lost of the combined change: at most {self.loss:.2%} of its norm ({worst})"
        ranks = sorted({getattr(s.method, "rank", 0) for s in self.plan.sites} - {0})
        size = f"{self.plan.num_parameters:,} parameters"
        full = "full weights" if any(s.method.name == "full" for s in self.plan.sites) else self.plan.method.name
        held = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else full
        return f"{self.plan.name} = {self.rule.name}({parts}): {held}, {size}\n{self.note or lost}"


def said_weight(weight: Weight) -> str:
    """A weight in words: one number, or the mean and what the numbers lie between."""
    if isinstance(weight, int | float):
        return f"{weight:g}"
    values = [*weight.values()]
    return f"({min(values):.3g} to {max(values):.3g}, mean {sum(values) / len(values):.3g})"


def rule_of(name: str, options: Mapping[str, Any] | None = None) -> Rule:
    """A rule by name, with options; RuleError names the nearest for one that is not there."""
    known = rules()
    if name not in known:
        raise RuleError(f"there is no rule {name!r}; {nearest(name, known)}")
    fields = [f.name for f in dataclasses.fields(known[name])]
    for key in options or {}:
        if key not in fields:
            raise RuleError(f"{name} has no option {key!r}; {nearest(key, fields) if fields else 'it has none'}")
    return known[name](**(options or {}))


@torch.no_grad()
def combine(
    model: nn.Module,
    adapters: Mapping[str, Weight] | Sequence[str],
    rule: str | Rule = "task_arithmetic",
    *,
    name: str,
    rank: int | None = None,
    loss: float | None = None,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    layers: Collection[int] | None = None,
    seed: int = 0,
) -> Combination:
    """Put a new adapter on a model that is made of others which it carries, of any methods that merge.

    adapters: {name: weight}, or names that all weigh 1; a weight may be {address: weight} over all sites.
    rule: a name or a rule with options (`weft.combining.rule_of`); it is applied to what the adapters change, site by
        site, with no change as the base.
    rank: of the new adapter at every site. loss: instead, the smallest rank at each site that loses at most this part
        of the combined change's norm. By default a sum of low-rank changes keeps all of it, another rule's result gets
        the largest rank of its parents, and dense changes stay dense (the method `full`).
    statistics: by adapter and address, for rules that weigh models by their own data (`weft.own_data`).
    layers: the numbers of those whose places alone are combined; None: all places.
    seed: for rules that draw.
    A sum in which one adapter alone counts, by 1, is that adapter, to the bit and of its own method.
    Raises AdapterError for an adapter that no weight can express, and before anything is changed.
    """
    rule = rule_of(rule) if isinstance(rule, str) else rule
    parents: dict[str, Weight] = dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    _check(model, parents, rule, rank, loss, statistics)
    whole = rank is None and loss is None and layers is None
    one = _only(parents, rule) if whole else None
    if one is not None:
        return _copied(model, one, name, rule, parents)
    generator = torch.Generator().manual_seed(seed)
    tasks: dict[str, _Task] = {}
    for address, seat in weave_of(model).seats.items():
        wanted = layers is None or seat.site.layer in layers
        here = {n: difference(seat, n) for n in parents if wanted and n in seat.adapters}
        if here:
            weights = {n: _weight_at(n, w, address, n in here) for n, w in parents.items()}
            shares = rule.factors(tuple(weights.values()))
            known = None if statistics is None else [_statistic(statistics, n, address) for n in parents]
            tasks[address] = _Task(seat.site, here, weights, rule, shares, generator, rank, loss, known)
    thin = _thin({address: task for address, task in tasks.items() if task.is_thin})
    made = {address: thin[address] if address in thin else _at(task) for address, task in tasks.items()}
    shared = any(records(model)[parent].plan.tied == "share" for parent in parents)
    plan = _plan(model, name, made, parents, "share" if shared else "separate")
    attach_plan(model, plan, tensors={a: _tensors(model, a, m) for a, m in made.items()})
    return Combination(plan, rule, parents, {a: m.loss for a, m in made.items()})


def _only(parents: Mapping[str, Weight], rule: Rule) -> str | None:
    """The one adapter that counts in a sum, where it counts by 1."""
    plain = [float(w) for w in parents.values() if isinstance(w, int | float)]
    shares = rule.factors(tuple(plain)) if len(plain) == len(parents) else None
    if shares is None or sorted(s for s in shares if s) != [1.0]:
        return None
    return [*parents][shares.index(1.0)]


def _weight_at(name: str, weight: Weight, address: str, here: bool) -> float:
    if isinstance(weight, int | float):
        return float(weight)
    if address not in weight and here:
        raise RuleError(f"the weights of {name} by site lack {address}; give one for every site that it adapts")
    return float(weight.get(address, 1.0))


def _statistic(statistics: Mapping[str, Mapping[str, Tensor]], name: str, address: str) -> Tensor:
    if address not in statistics.get(name, {}):
        raise RuleError(f"the statistics of {name} lack {address}; measure them at every place that an adapter adapts")
    return statistics[name][address]


@dataclass(frozen=True)
class _Task:
    """What was asked for, at one site. here: what the parents that are there change; shares: what each change is
    multiplied by, where the rule is a sum."""

    site: Site
    here: Mapping[str, Difference]
    parents: Mapping[str, float]
    rule: Rule
    shares: Sequence[float] | None
    generator: torch.Generator
    rank: int | None
    loss: float | None
    statistics: Sequence[Tensor] | None

    @property
    def is_thin(self) -> bool:
        """Whether the result is a sum of pairs of thin matrices."""
        return self.shares is not None and all(d.factored for d in self.here.values())

    def sum(self) -> tuple[Tensor, Tensor]:
        """b [O, R] and a [R, I] of that sum."""
        share = dict(zip(self.parents, self.shares or (), strict=True))
        b = torch.cat([share[n] * self.wide(d.b) for n, d in self.here.items()], -1)
        return b, torch.cat([flat(self.wide(d.a), self.site) for d in self.here.values()], -2)

    def ruled(self, changes: Sequence[Tensor]) -> Tensor:
        zero, weights = torch.zeros_like(changes[0]), [*self.parents.values()]
        return self.rule(changes, weights=weights, base=zero, statistics=self.statistics, generator=self.generator)

    def wide(self, t: Tensor | None) -> Tensor:
        """In a precision that sums and decompositions can bear."""
        assert t is not None, "a change has one of two forms"
        return t if t.dtype == torch.float64 else t.float()


@dataclass(frozen=True)
class _Made:
    """The combined change at one site, in the form that is written."""

    b: Tensor | None
    a: Tensor | None
    dense: Tensor | None
    shift: Tensor | None
    loss: float


def _at(task: _Task) -> _Made:
    """The rule on dense changes at one site; of a parent that is not here, on no change."""
    dense, shift = _ruled(task.site, task.here, task), _shift(task.site, task.here, task)
    factored = all(d.factored for d in task.here.values())
    if dense.ndim < 2 or shift is not None or not (factored or task.rank or task.loss is not None):
        return _Made(None, None, dense, shift, 0.0)

    def rank_of(s: Tensor) -> int:
        if task.loss is not None:
            return rank_for(s, task.loss)
        largest = max((d.b.shape[-1] for d in task.here.values() if d.b is not None), default=1)
        return min(task.rank or largest, s.shape[-1])

    u, s, v = _spectrum(flat(dense, task.site), rank_of)
    b, a, lost = nearest_of_rank(u, s, v, u.shape[-1])
    return _Made(b, with_kernel(a, task.site), None, None, lost)


def _thin(tasks: Mapping[str, _Task]) -> dict[str, _Made]:
    """Sums of pairs of thin matrices at their sites, those of one shape at once."""
    alike: dict[Any, list[tuple[str, Tensor, Tensor]]] = {}
    for address, task in tasks.items():
        b, a = task.sum()
        alike.setdefault((b.shape, a.shape, b.dtype, b.device), []).append((address, b, a))
    made: dict[str, _Made] = {}
    for sums in alike.values():
        for start in range(0, len(sums), _AT_ONCE):
            addresses, bs, as_ = zip(*sums[start : start + _AT_ONCE], strict=True)
            task = tasks[addresses[0]]
            found = _truncated(
                torch.stack(bs), torch.stack(as_), task.rank, _ROUNDING if task.loss is None else task.loss
            )
            made |= {address: _written(tasks[address], *one) for address, one in zip(addresses, found, strict=True)}
    return made


def _truncated(b: Tensor, a: Tensor, rank: int | None, loss: float) -> Iterator[tuple[Tensor, Tensor, float]]:
    """b a of every site [S, ...] as thin as asked: of a rank, or of the smallest that loses at most `loss`."""
    u, s, v = singular(b, a)
    root = s.sqrt()
    wide, tall = u * root.unsqueeze(-2), root.unsqueeze(-1) * v
    left = s.square().flip(-1).cumsum(-1).flip(-1)  # [S, ..., N], of the squared norm, without the first n
    whole = left[..., :1].clamp(min=torch.finfo(s.dtype).tiny)
    needed = (left.sqrt() > loss * whole.sqrt()).sum(-1)  # [S, ...]
    ranks = needed.view(len(s), -1).amax(1).clamp(min=1).tolist()  # of experts, the one that needs most
    shares = left.view(len(s), -1, s.shape[-1]).sum(1)  # [S, N]
    lost = (shares / shares[:, :1].clamp(min=torch.finfo(s.dtype).tiny)).sqrt().tolist()
    for i, found in enumerate(ranks):
        kept = min(rank or found, s.shape[-1])
        yield wide[i][..., :kept], tall[i][..., :kept, :], lost[i][kept] if kept < s.shape[-1] else 0.0


def _written(task: _Task, b: Tensor, a: Tensor, lost: float) -> _Made:
    shift = _shift(task.site, task.here, task)
    if shift is None:
        return _Made(b, with_kernel(a, task.site), None, None, lost)
    return _Made(None, None, with_kernel(b @ a, task.site), shift, 0.0)  # a low-rank adapter has no bias of its own


def _spectrum(m: Tensor, rank_of: Callable[[Tensor], int]) -> _Spectrum:
    """All singular values of matrices [..., O, I], and the first vectors, as many as `rank_of` says by the values.

    Through the smaller of m m^T and m^T m in float64: that is a few times faster than decomposing m, and of all vectors
    u diag(s) v is m whatever the small values have lost: v is u^T m.
    """
    if m.shape[-2] > m.shape[-1]:
        v, s, u = _spectrum(m.mT, rank_of)
        return u.mT, s, v.mT
    wide = m.double()
    values, u = torch.linalg.eigh(wide @ wide.mT)  # ascending
    s = values.clamp(min=0).flip(-1).sqrt().to(m.dtype)
    rank = rank_of(s)
    u = u[..., -rank:].flip(-1)
    v = u.mT @ wide / s[..., :rank].double().clamp(min=torch.finfo(m.dtype).tiny).unsqueeze(-1)
    return u.to(m.dtype), s, v.to(m.dtype)


def _ruled(site: Site, here: Mapping[str, Difference], task: _Task) -> Tensor:
    """The rule on dense changes; one expert after another, for which weights are matrices too."""
    known = {n: task.wide(d.weight()) for n, d in here.items()}
    zero = torch.zeros_like(next(iter(known.values())))
    each = [known.get(n, zero) for n in task.parents]
    if site.experts is None:
        return task.ruled(each)
    return torch.stack([task.ruled([t[e] for t in each]) for e in range(site.experts)])


def _shift(site: Site, here: Mapping[str, Difference], task: _Task) -> Tensor | None:
    """The combined change of the bias."""
    if all(d.shift is None for d in here.values()):
        return None
    if not site.has_bias:
        raise AdapterError(
            f"{site.address} has no bias, and one of {', '.join(here)} shifts its output: no adapter of one method "
            "holds such a sum; use them together in a route"
        )
    if task.rule.needs:
        raise AdapterError(f"{site.address}: an adapter changes a bias, for which {task.rule.name} has no statistics")
    zero = torch.zeros_like(next(d.shift for d in here.values() if d.shift is not None))
    shifts = [d.shift if (d := here.get(n)) is not None and d.shift is not None else zero for n in task.parents]
    return task.ruled(shifts)


def _tensors(model: nn.Module, address: str, made: _Made) -> dict[str, Tensor | Frozen]:
    seat = weave_of(model).seats[address]
    dtype = seat.site.dtype
    if made.b is not None and made.a is not None:
        return {"A": made.a.to(dtype).contiguous(), "B": made.b.to(dtype).contiguous()}
    assert made.dense is not None, "a change has one of two forms"
    found: dict[str, Tensor | Frozen] = {"weight": (seat.weight() + made.dense).to(dtype)}
    bias = seat.bias()
    if bias is not None:
        found["bias"] = (bias if made.shift is None else bias + made.shift).to(dtype).clone()
    return found


def _plan(model: nn.Module, name: str, made: Mapping[str, _Made], parents: Iterable[str], tied: str) -> Plan:
    """The parents' sites with the methods that hold the result: nothing is matched anew."""
    known = {s.site.address: s for parent in parents for s in records(model)[parent].plan.sites}
    widest = max((m.b.shape[-1] for m in made.values() if m.b is not None), default=None)
    sites = []
    for address, m in made.items():
        method = _method(None if m.b is None else m.b.shape[-1])
        if known[address].site.kind not in method.kinds:
            kind = known[address].site.kind
            raise AdapterError(f"{address}: {method.name} adapts no {kind}, so no adapter holds what is combined there")
        sites.append(dataclasses.replace(known[address], method=method))
    return Plan(name, _method(widest), tuple(sites), [*made], tied)


@cache
def _method(rank: int | None) -> Method:
    """What holds a change of a rank, or a dense one."""
    return method_from_spec({"name": "full"} if rank is None else {"name": "lora", "rank": rank, "alpha": float(rank)})


def _copied(model: nn.Module, source: str, name: str, rule: Rule, parents: Mapping[str, Weight]) -> Combination:
    """The same adapter under another name."""
    record = records(model)[source]

    def clones(module: nn.Module) -> dict[str, Tensor | Frozen]:
        own: dict[str, Tensor | Frozen] = {k: p.detach().clone() for k, p in module.named_parameters(recurse=False)}
        return own | {k: Frozen(b.clone()) for k, b in module.named_buffers(recurse=False)}

    plan = dataclasses.replace(record.plan, name=name)
    tensors = {address: clones(adapter) for address, adapter in record.adapters.items()}
    attach_plan(model, plan, tensors=tensors, shared={m: clones(holder) for m, holder in record.shared.items()})
    return Combination(plan, rule, parents, dict.fromkeys(tensors, 0.0))


def _check(
    model: nn.Module, parents: Mapping[str, Weight], rule: Rule, rank: int | None, loss: float | None, statistics: Any
) -> None:
    known = records(model)
    for name in parents:
        if name not in known:
            hint = nearest(name, known) if known else "it has none"
            raise AdapterError(f"this model has no adapter {name!r}; {hint}")
    if not parents:
        raise RuleError("there is nothing to combine: name at least one adapter")
    if rank is not None and loss is not None:
        raise RuleError("rank and loss both say how much is kept: give one of them")
    if statistics is not None and not rule.needs:
        raise RuleError(f"{rule.name} weighs no adapter by statistics of its data: leave them out")
    if rule.needs and statistics is None:
        raise RuleError(
            f"{rule.name} weighs adapters by the {rule.needs} of their own data: give statistics, as "
            "weft.own_data.own_statistics measures them (--own on the command line)"
        )
    if weave_of(model).merged is not None:
        raise AdapterError(f"{weave_of(model).merged!r} is merged into the weights; unmerge before combining")
