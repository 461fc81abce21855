"""Many adapters of one base made smaller together: what they have in common is kept once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.attach import attach_plan, detach, records, weave_of
from weft.compress import joint_basis, principal_basis
from weft.compressing.ranks import EXACT
from weft.core.method import Frozen, Method
from weft.core.site import Site
from weft.core.thin import nearest, rank_for
from weft.differences import difference, flat, with_kernel
from weft.errors import AdapterError
from weft.registry import method_from_spec

__all__ = ["SETS", "SetWay", "Together", "compress_together"]

SetWay = Literal["joint", "eigenlorax"]
SETS: tuple[str, ...] = ("joint", "eigenlorax")
"""joint: a small matrix of each adapter between two shared ones; eigenlorax: its factors on shared directions."""

Pair = tuple[Tensor, Tensor]
_Own = tuple[Mapping[str, Any], Mapping[str, Tensor | Frozen]]
"""What one adapter is at one site: the specification of its method there, and its tensors."""


@dataclass(frozen=True)
class Together:
    """What was put on the model. bases: tensors that several share, by the name that they are stored under.

    names: of the new adapters, in the order of their sources. shared: by new adapter, which of its tensors are which
    of `bases`. losses: by source and address, the share of the norm of its change that is lost. growth: by source, by
    what share its loss per token grew, where that was asked for.
    """

    names: Sequence[str]
    bases: Mapping[str, Tensor]
    shared: Mapping[str, Mapping[str, str]]
    losses: Mapping[str, Mapping[str, float]]
    growth: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> tuple[str, str, float]:
        """The source and address that lose most, and what they lose."""
        name = max(self.losses, key=lambda n: max(self.losses[n].values()))
        address = max(self.losses[name], key=lambda a: self.losses[name][a])
        return name, address, self.losses[name][address]

    @property
    def mean(self) -> float:
        """What is lost on average, over adapters and sites."""
        every = [loss for own in self.losses.values() for loss in own.values()]
        return sum(every) / len(every)


@dataclass(frozen=True)
class _Fitted:
    """All adapters of one site. bases: U and V by cluster. own: what each adapter has of its own, and its cluster."""

    spec: Mapping[str, Any]
    bases: Sequence[Mapping[str, Tensor]]
    own: Sequence[tuple[int, Mapping[str, Tensor], Mapping[str, Any]]]
    losses: Sequence[float]


@torch.no_grad()
def compress_together(
    model: nn.Module,
    sources: Sequence[str],
    names: Sequence[str],
    *,
    way: SetWay = "joint",
    rank: int | None = None,
    loss: float | None = None,
    clusters: int = 1,
    diagonal: bool = False,
    loss_of: Callable[[str], float] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Together:
    """Put copies of many adapters on their model that share what they can: as `shared_basis`, or as `eigenlorax`.

    rank: directions of the shared basis on each side, or as many as a site has where that is less. loss: instead, the
        fewest at each site that lose at most this share of the norm of any adapter's change there. With `loss_of`,
        which measures the loss per token of an adapter, the fewest with which that grows by at most this share.
    clusters, diagonal: see `weft.compress.joint_basis`; of `joint` only.
    Raises AdapterError for an adapter that changes a norm or a bias, or that no weight can express.
    """
    if (rank is None) == (loss is None):
        raise ValueError("a rank or a loss says how much of the adapters is kept: give one of them")
    if way not in SETS:
        raise ValueError(f"there is no way {way!r} to make several adapters smaller together: {', '.join(SETS)}")
    if way == "eigenlorax" and (clusters > 1 or diagonal):
        raise ValueError("clusters and a diagonal are of the way joint: eigenlorax has one basis and full factors")
    fit = _Fit(way, rank, loss, clusters, diagonal)
    if loss_of is None:
        return _put(model, sources, names, fit, say)
    before = {name: loss_of(name) for name in sources}

    def tried(rank: int) -> Together:
        made = _put(model, sources, names, dataclasses.replace(fit, rank=rank, loss=None), say)
        pairs = zip(sources, names, strict=True)
        return dataclasses.replace(made, growth={n: (loss_of(new) - before[n]) / before[n] for n, new in pairs})

    return tried(rank) if rank is not None else _within(model, sources, tried, loss or 0.0, way)


def _within(
    model: nn.Module, sources: Sequence[str], tried: Callable[[int], Together], loss: float, way: str
) -> Together:
    """The fewest directions with which no adapter's loss per token grows by more; AdapterError where there are none."""
    sites = [planned.site for name in sources for planned in records(model)[name].plan.sites]
    low, high = 1, max(min(s.out_features, math.prod(s.shape[1:])) for s in sites)
    found, rank = tried(high), high
    worst = max(found.growth, key=lambda name: found.growth[name])
    if found.growth[worst] > loss:
        _take_off(model, found)
        raise AdapterError(
            f"the loss per token of {worst} grows by {found.growth[worst]:.3%} with all {rank} directions of {way}, "
            f"more than {loss:.3%}"
        )
    while low < high:  # what is high has held
        rank = (low + high) // 2
        _take_off(model, found)
        found = tried(rank)
        low, high = (low, rank) if max(found.growth.values()) <= loss else (rank + 1, high)
    if rank != high:
        _take_off(model, found)
        found = tried(high)
    return found


def _take_off(model: nn.Module, made: Together) -> None:
    for name in made.names:
        detach(model, name)


def _put(
    model: nn.Module, sources: Sequence[str], names: Sequence[str], fit: _Fit, say: Callable[[str], None]
) -> Together:
    addresses = dict.fromkeys(address for name in sources for address in records(model)[name].adapters)
    made: dict[str, dict[str, _Own]] = {n: {} for n in sources}
    bases: dict[str, Tensor] = {}
    shared: dict[str, dict[str, str]] = {name: {} for name in names}
    losses: dict[str, dict[str, float]] = {n: {} for n in sources}
    new = dict(zip(sources, names, strict=True))
    for count, address in enumerate(addresses, start=1):
        here = [name for name in sources if address in records(model)[name].adapters]
        site = weave_of(model).seats[address].site
        fitted = fit(site, [_pair(model, address, name) for name in here])
        for k, basis in enumerate(fitted.bases):
            bases |= {f"{address}.{k}.{key}": t for key, t in basis.items()}
        for name, (k, own, options), lost in zip(here, fitted.own, fitted.losses, strict=True):
            frozen = {key: Frozen(t) for key, t in fitted.bases[k].items()}
            made[name][address] = {**fitted.spec, **options}, {**own, **frozen}
            shared[new[name]] |= {f"{address}.{key}": f"{address}.{k}.{key}" for key in frozen}
            losses[name][address] = lost
        say(f"{count} of {len(addresses)}: {address}, {len(here)} adapters, at most {max(fitted.losses):.2%} lost")
    for name in sources:
        _attach(model, name, new[name], made[name])
    return Together(names, bases, shared, losses)


@dataclass(frozen=True)
class _Fit:
    """How the adapters of one site are fitted."""

    way: str
    rank: int | None
    loss: float | None
    clusters: int
    diagonal: bool

    def __call__(self, site: Site, pairs: Sequence[Pair]) -> _Fitted:
        most = min(pairs[0][0].shape[0], pairs[0][1].shape[1])
        if self.rank is not None:
            return self._of_rank(site, pairs, min(self.rank, most))
        low, high = 1, most
        best = self._of_rank(site, pairs, most)
        while low < high:  # the fewest directions that lose little enough: all of them lose nothing
            middle = (low + high) // 2
            found = self._of_rank(site, pairs, middle)
            low, high, best = (
                (low, middle, found) if max(found.losses) <= (self.loss or 0.0) else (middle + 1, high, best)
            )
        if max(best.losses) > (self.loss or 0.0):
            raise AdapterError(
                f"{site.address}: {self.way} loses {max(best.losses):.3%} of an adapter's change with all {most} "
                f"directions that there are, more than {self.loss:.3%}"
            )
        return best

    def _of_rank(self, site: Site, pairs: Sequence[Pair], rank: int) -> _Fitted:
        dtype = site.dtype

        def kept(t: Tensor) -> Tensor:
            return t.to(dtype).contiguous()

        if self.way == "joint":
            found = joint_basis(pairs, rank, diagonal=self.diagonal, clusters=min(self.clusters, len(pairs)))
            bases = [{"U": kept(u), "V": kept(with_kernel(v, site))} for u, v in zip(found.u, found.v, strict=True)]
            own: list[tuple[int, Mapping[str, Tensor], Mapping[str, Any]]]
            own = [(int(k), {"S": kept(s)}, {}) for k, s in zip(found.cluster, found.s, strict=True)]
            spec = {"name": "shared_basis", "rank": rank, "diagonal": self.diagonal}
            return _Fitted(spec, bases, own, found.losses.tolist())
        basis = principal_basis(pairs, rank)
        bases = [{"U": kept(with_kernel(basis.u, site)), "V": kept(basis.v)}]
        factors = [
            (0, {"c_A": kept(a), "c_B": kept(b)}, {"rank": len(a), "alpha": float(len(a))}) for b, a in basis.pairs
        ]
        return _Fitted({"name": "eigenlorax", "num_components": rank}, bases, factors, basis.losses.tolist())


def _pair(model: nn.Module, address: str, name: str) -> Pair:
    """What an adapter changes at a site as two thin matrices."""
    change = difference(weave_of(model).seats[address], name)
    site = change.site
    if site.experts is not None:
        raise AdapterError(f"{address} holds {site.experts} experts: shared bases are of one map at a time")
    if change.shift is not None or (change.dense is not None and change.dense.ndim < 2):
        method = records(model)[name].plan.method.name
        what = "a bias" if change.shift is not None else "a norm"
        raise AdapterError(f"{address}: {method} changes {what} here, which no basis of matrices holds")
    if change.b is not None and change.a is not None:
        return change.b, flat(change.a, site)
    u, s, v = torch.linalg.svd(flat(change.weight(), site).float(), full_matrices=False)
    b, a, _ = nearest(u, s, v, rank_for(s, EXACT))
    return b, a


def _attach(model: nn.Module, source: str, name: str, made: Mapping[str, _Own]) -> None:
    """A new adapter at the very sites of its source, which need not be looked for again."""
    old = records(model)[source].plan
    sites = tuple(dataclasses.replace(s, method=_method(*made[s.site.address][0].items())) for s in old.sites)
    main = max((s.method for s in sites), key=lambda method: int(getattr(method, "rank", 0)))
    plan = dataclasses.replace(old, name=name, method=main, sites=sites, targets=[*made])
    attach_plan(model, plan, tensors={address: tensors for address, (_, tensors) in made.items()})


@cache
def _method(*spec: tuple[str, Any]) -> Method:
    """The method of a specification, which hundreds of adapters have at every site."""
    return method_from_spec(dict(spec))
