"""Routes: which adapters apply to which rows. One mechanism for switching, blending, nesting and mixed batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from weft.core.adapter import Adapted, Adapter, Watched, run
from weft.core.affine import NotLinear, WeightOp
from weft.core.choices import unrecorded
from weft.core.fused import value
from weft.core.gather import Gather, reading
from weft.core.method import Method
from weft.core.op import DataOp, Op
from weft.core.parts import Layers, Split
from weft.core.pile import Pile, likeness
from weft.core.positions import Positions
from weft.core.view import Once, OpView, Spy

Adapters = Mapping[str, Adapter]


@dataclass(frozen=True)
class Stack:
    """Adapters nested in order: each adapts the map that the ones before it made."""

    routes: tuple[Any, ...]

    def __init__(self, *routes: Any):
        if not routes:
            raise ValueError("a stack needs at least one adapter; None is the base")
        object.__setattr__(self, "routes", tuple(as_route(r) for r in routes))


@dataclass(frozen=True)
class Blend:
    """W x + sum_k weight_k (f_k(x) - W x): the weighted sum of what each adapter changes."""

    weights: tuple[tuple[Any, float], ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """One route per row of the next batches. routes: the distinct ones; ids: for every row, which of them."""

    routes: tuple[Any, ...]
    ids: tuple[int, ...]
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rows:
        return Rows(self.routes, self.ids)

    def __reduce__(self) -> Any:
        return Rows, (self.routes, self.ids)

    def for_leading(self, size: int, exact: bool, expand: int) -> tuple[int, ...]:
        """The ids of `size` leading entries: rows, expanded rows of a generation, or their flattened tokens."""
        rows = len(self.ids) * expand
        if size != rows and (exact or size % rows):
            raise ValueError(
                f"the route has {len(self.ids)} rows and the batch has {size}: "
                "give `weft.use` one entry per row of the batch"
            )
        each = size // len(self.ids)
        return tuple(i for i in self.ids for _ in range(each))


Route = None | str | Stack | Blend | Rows | Layers | Split


def as_route(value: Any) -> Route:
    """None, a name, {name: weight}, a list with one route per row, or a route; TypeError for anything else."""
    if value is None or isinstance(value, str | Stack | Blend | Rows | Layers | Split):
        return value
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("a blend needs at least one adapter; None is the base")
        return Blend(tuple((as_route(k), float(v)) for k, v in value.items()))
    if isinstance(value, Sequence):
        rows = [as_route(v) for v in value]
        if not rows:
            raise ValueError("a route per row needs at least one row")
        if any(isinstance(r, Rows) for r in rows):
            raise TypeError("a row's route cannot itself be a list of rows")
        routes = tuple(dict.fromkeys(rows))
        return Rows(routes, tuple(routes.index(r) for r in rows))
    raise TypeError(
        f"{value!r} is not a route: give a name, None for the base, {{name: weight}}, weft.Stack(...), "
        "weft.Layers(...), weft.Split(...), or a list with one of these per row"
    )


def parts(route: Route) -> tuple[Any, ...]:
    """The routes that a route is made of."""
    match route:
        case Stack(routes=inner) | Rows(routes=inner):
            return inner
        case Layers() | Split():
            return route.routes
        case Blend(weights=weights):
            return tuple(r for r, _ in weights)
    return ()


def names(route: Route) -> set[str]:
    """Every adapter a route mentions."""
    return {route} if isinstance(route, str) else set().union(*map(names, parts(route)))


def reads_places(route: Route) -> bool:
    """Whether a route goes by where tokens stand in their rows."""
    return isinstance(route, Split) or any(map(reads_places, parts(route)))


def apply(route: Route, x: Any, op: Op, adapters: Adapters, expand: int = 1) -> Any:
    """x through `op` under a route. An adapter that is not at this site leaves the map as it is."""
    if route is None:
        return op(x)
    if isinstance(route, str):
        adapter = adapters.get(route)
        return op(x) if adapter is None else adapter.run(x, op, keep=isinstance(op, DataOp))
    if isinstance(route, Layers):
        return apply(route.at(op.site), x, op, adapters, expand)
    if isinstance(route, Split):
        if not isinstance(op, DataOp | OpView) or not isinstance(x, Tensor):
            raise NotLinear("has one adapter per span of tokens, and a weight is the same for all tokens")
        if not names(route) & adapters.keys():
            return op(x)
        pieces = [apply(r, part, op, adapters, expand) for r, part in route.cut(x, op)]
        return torch.cat(pieces, 1)
    if isinstance(route, Stack):
        return nest(route, op, adapters)(x)
    if isinstance(route, Blend):
        present = [(r, w) for r, w in route.weights if names(r) & adapters.keys()]
        op = Once(op)
        base = y = op(x)
        for r, w in present:
            y = y + w * (apply(r, x, op, adapters) - base)
        return y
    return _apply_rows(route, x, op, adapters, expand)


def nest(route: Route, op: Op, adapters: Adapters) -> Op:
    """The operator that a route without rows makes of `op`."""
    if isinstance(route, str):
        return Adapted(adapters[route], op) if route in adapters else op
    if isinstance(route, Stack):
        for part in route.routes:
            op = nest(part, op, adapters)
        return op
    if isinstance(route, Layers):
        return nest(route.at(op.site), op, adapters)
    if route is None:
        return op
    raise TypeError(f"weft.Stack nests names and other stacks, not {route!r}")


def merged(route: Route, op: WeightOp, adapters: Adapters) -> Any:
    """The affine map that a route makes of a weight. NotLinear when a method has no weight of its own."""
    if isinstance(route, Rows):
        raise ValueError("a route with one adapter per row has no single weight to merge")
    return apply(route, op.input(), op, adapters)


def _apply_rows(rows: Rows, x: Tensor, op: Op, adapters: Adapters, expand: int) -> Tensor:
    if not isinstance(op, DataOp):
        raise TypeError("a route with one adapter per row applies to data only")
    plan = _partition(rows, x, op, adapters, expand)
    if len(plan.groups) == 1:
        return _run_group(rows, plan.groups[0], x, op, op, adapters)
    inputs = plan.cut(x)
    direct = [n for n, g in enumerate(plan.groups) if g.direct]
    common = Common(op, x, {n: inputs[n] for n in direct}, plan) if len(direct) > 1 else None
    pieces = []
    for n, (group, part) in enumerate(zip(plan.groups, inputs, strict=True)):
        frozen: Op = op
        if common is not None and group.direct:
            frozen = Portion(op, part, n, common, group.where)
        here = {adapters[a].method for r in group.routes for a in names(rows.routes[r]) & adapters.keys()}
        if any(method.reads_batch for method in here):
            frozen = Chosen(frozen, x, group.where)
        pieces.append(_run_group(rows, group, part, op, frozen, adapters))
    return plan.join(pieces)


@dataclass(eq=False)
class _Group:
    """Rows that one call can serve. routes: the distinct ones, by number; ids: for each block of rows, which of them.

    direct: whether its body reads the frozen map of its input as it is, so that it can share one call of the map.
    """

    routes: list[int]
    where: Tensor
    ids: Tensor | None
    num_blocks: int
    direct: bool


@dataclass(frozen=True, eq=False)
class _Partition:
    """The groups of a batch. sizes: their rows, where these stand in the batch one group after another; back: the place
    of every row of the batch among the rows of all groups, where they do not."""

    groups: list[_Group]
    sizes: list[int] | None
    back: Tensor | None

    def cut(self, x: Tensor) -> Sequence[Tensor]:
        """The rows of every group."""
        if self.sizes is not None:
            return x.split(self.sizes)  # one concatenation in the backward
        return [x.index_select(0, g.where) for g in self.groups]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The inverse of `cut`."""
        y = torch.cat([*pieces])
        return y if self.back is None else y.index_select(0, self.back)


def _partition(rows: Rows, x: Tensor, op: DataOp, adapters: Adapters, expand: int) -> _Partition:
    """How a batch is served: made once for every size of batch and set of adapters."""
    key = ("partition", id(adapters), x.shape[0], x.ndim != 2, expand, x.device)
    if key not in rows._cache:
        ids = rows.for_leading(x.shape[0], exact=x.ndim != 2, expand=expand)
        groups, order = [], []
        for routes in _groups(rows, adapters):
            where = [n for n, i in enumerate(ids) if i in routes]
            order += where
            direct = _is_direct(rows.routes[routes[0]], x[:1], op, adapters)
            groups.append(_group(routes, where, [routes.index(ids[n]) for n in where], x.device, direct))
        in_order = order == [*range(len(ids))]
        back = None if in_order else torch.tensor(order, device=x.device).argsort()
        rows._cache[key] = _Partition(groups, [len(g.where) for g in groups] if in_order else None, back)
    return rows._cache[key]


def _group(routes: list[int], where: list[int], local: list[int], device: torch.device, direct: bool) -> _Group:
    """Rows of one adapter that stand together make blocks, as large as all such runs allow."""
    size = math.gcd(*(len([*run]) for _, run in groupby(local)))
    blocks = local[::size]
    ids = None if blocks == [*range(len(routes))] else torch.tensor(blocks, device=device)
    return _Group(routes, torch.tensor(where, device=device), ids, len(blocks), direct)


_direct: dict[tuple[Method, str], bool] = {}


@torch.no_grad()
def _is_direct(route: Route, x: Tensor, op: DataOp, adapters: Adapters) -> bool:
    """Whether a route reads the frozen map of its input as it is: looked at once for every method and kind of site."""
    if isinstance(route, Stack):
        return all(_is_direct(r, x, op, adapters) for r in route.routes)
    if isinstance(route, Split):
        return False
    if not isinstance(route, str) or route not in adapters:
        return True
    adapter = adapters[route]
    key = (adapter.method, adapter.site.kind)
    if key not in _direct:
        if torch.compiler.is_compiling():  # a look would become part of the graph
            return False
        spy = Spy(op, x)
        with unrecorded():
            run(adapter.method, adapter.coefficients(op), x, spy)
        _direct[key] = spy.asked
    return _direct[key]


def _groups(rows: Rows, adapters: Adapters) -> list[list[int]]:
    """Routes that one stacked call can serve: alike adapters, or no adapter here."""
    groups: dict[Any, list[int]] = {}
    for i, route in enumerate(rows.routes):
        key: Any = i
        if not names(route) & adapters.keys():
            key = None
        elif isinstance(route, str):
            key = likeness(adapters[route])
        groups.setdefault(key, []).append(i)
    return list(groups.values())


class Common:
    """The frozen map of several parts of a batch, computed in one call when the first of them is asked for.

    Where these are all its parts, the batch goes through as it is: what a block is given beside it is for its rows.
    """

    def __init__(self, op: DataOp, batch: Tensor, parts: Mapping[int, Tensor], plan: _Partition):
        self.op, self.batch, self.parts, self.plan = op, batch, parts, plan
        self.found: dict[int, Tensor] = {}

    def of(self, number: int) -> Tensor:
        """The map of one of the parts."""
        if not self.found:
            groups = self.plan.groups
            if len(self.parts) < len(groups):
                y = self.op(torch.cat([*self.parts.values()]))
            else:
                y = self.op(self.batch)
                y = y if self.plan.back is None else y.index_select(0, torch.cat([g.where for g in groups]))
            self.found.update(zip(self.parts, y.split([p.shape[0] for p in self.parts.values()]), strict=True))
        return self.found[number]


class Portion(OpView):
    """A map on a part of a batch, which takes its share of what is computed for several parts at once.

    where: the rows that the part has of the batch.
    """

    def __init__(self, inner: DataOp, part: Tensor, number: int, common: Common, where: Tensor):
        super().__init__(inner)
        self.part, self.number, self.common, self.where = part, number, common, where

    def positions(self, x: Any) -> Positions:
        return self.inner.positions(self.common.batch).rows(self.where)

    def __call__(self, x: Tensor) -> Tensor:
        if x is self.part:
            return self.common.of(self.number)
        y: Tensor = self.inner(x)
        return y


class Chosen(OpView):
    """A map on some rows of a batch, which knows what is given for them and what the layers before gave of them.

    whole: the batch that these rows are of; where: which they are.
    """

    def __init__(self, inner: Op, whole: Tensor, where: Tensor):
        super().__init__(inner)
        self.whole, self.where = whole, where

    def given(self, x: Any, name: str, count: int) -> Tensor:
        values: Tensor = self.inner.given(self.whole, name, count)
        return values if values.shape[0] == 1 else values.index_select(0, self.where)

    def invoked(self, x: Any, tokens: tuple[int, ...]) -> Tensor:
        return self.inner.invoked(self.whole, tokens).index_select(0, self.where)

    def hidden(self) -> list[Tensor]:
        return [state.index_select(0, self.where) for state in self.inner.hidden()]

    def self_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # the mask and the cache have all rows of the batch
        full = (t.new_zeros(len(self.whole), *t.shape[1:]).index_copy(0, self.where, t) for t in (query, key, value))
        return self.inner.self_attention(*full).index_select(0, self.where)

    def positions(self, x: Any) -> Positions:
        if isinstance(self.inner, Portion):
            return self.inner.positions(x)
        return self.inner.positions(self.whole).rows(self.where)


def _run_group(rows: Rows, group: _Group, x: Tensor, op: DataOp, frozen: Op, adapters: Adapters) -> Tensor:
    """One group's rows through its adapters. frozen: what computes the map itself."""
    routes = [rows.routes[i] for i in group.routes]
    if not names(routes[0]) & adapters.keys():
        return frozen(x)
    if len(routes) > 1:
        members = [adapters[r] for r in routes]
        gather = Gather(op, group.ids, group.num_blocks, frozen)
        y: Tensor = value(run(members[0].method, _stacked(rows, members, op), x, reading(gather, x)))
        return y
    if isinstance(routes[0], str):
        adapter = adapters[routes[0]]
        return run(adapter.method, adapter.coefficients(op, keep=True), x, frozen)
    return apply(routes[0], x, frozen, adapters)


def _stacked(rows: Rows, members: list[Adapter], op: DataOp) -> Mapping[str, Tensor]:
    """The coefficients of several adapters, stacked [K, ...]; kept between calls while no gradient is wanted."""
    pile: Pile | None = members[0].__dict__.get("pile")
    if pile is not None and torch.is_grad_enabled():
        return pile.coefficients(members, op)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _stack([a.coefficients(op) for a in members])
    key = ("stack", *map(id, members))
    kept = rows._cache.get(key)
    ages = [a.age for a in members]
    if kept is not None and kept[0] == ages and kept[1].unchanged():
        return kept[2]
    watched = Watched(members, op)
    stacked = _stack([a.coefficients(op, keep=True) for a in members])
    if watched.countable:
        rows._cache[key] = ages, watched, stacked
    return stacked


def _stack(each: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    return {k: torch.stack([c[k] for c in each]) for k in each[0]}
