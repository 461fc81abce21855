"""Routes: which adapters apply to which rows. One mechanism for switching, blending, nesting and mixed batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from weft.core.adapter import Adapted, Adapter, changes, run
from weft.core.affine import NotLinear, WeightOp
from weft.core.choices import unrecorded
from weft.core.fused import value
from weft.core.gather import Gather, reading
from weft.core.method import Method
from weft.core.op import DataOp, Op
from weft.core.parts import Layers, Split
from weft.core.pile import likeness
from weft.core.portions import Chosen, Common, Portion
from weft.core.stacked import Stacked
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
class Weighted:
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


Route = None | str | Stack | Weighted | Rows | Layers | Split


def as_route(value: Any) -> Route:
    """None, a name, {name: weight}, a list with one route per row, or a route; TypeError for anything else."""
    if value is None or isinstance(value, str | Stack | Weighted | Rows | Layers | Split):
        return value
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("a blend needs at least one adapter; None is the base")
        return Weighted(tuple((as_route(k), float(v)) for k, v in value.items()))
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
        case Weighted(weights=weights):
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
    if isinstance(route, Weighted):
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
        return _run_group(plan.groups[0], x, op, op, adapters)
    inputs = plan.cut(x)
    direct = [n for n, g in enumerate(plan.groups) if g.direct]
    common = None
    if len(direct) > 1:
        wanted, where = {n: inputs[n] for n in direct}, [g.where for g in plan.groups]
        common = Common(op, x, wanted, where, plan.back is None)
    pieces = []
    for n, (group, part) in enumerate(zip(plan.groups, inputs, strict=True)):
        frozen: Op = op
        if common is not None and group.direct:
            frozen = Portion(op, part, n, common, group.where)
        if group.reads_batch:
            frozen = Chosen(frozen, x, group.where)
        pieces.append(_run_group(group, part, op, frozen, adapters))
    return plan.join(pieces)


@dataclass(eq=False)
class _Group:
    """Rows that one call can serve. routes: the distinct ones; ids: for each block of rows, which of them.

    stacked: the coefficients of their adapters, where there are several. present: whether any has an adapter here.
    direct: whether its body reads the frozen map of its input as it is, so that it can share one call of the map.
    reads_batch: whether a body wants what is given for its rows.
    """

    routes: list[Route]
    where: Tensor
    ids: Tensor | None
    num_blocks: int
    present: bool
    stacked: Stacked | None
    direct: bool
    reads_batch: bool


@dataclass(eq=False)
class _Partition:
    """The groups of a batch. sizes: their rows, where these stand in the batch one group after another; back: the place
    of every row of the batch among the rows of all groups, where they do not.

    held: which of the site's adapters `mentioned` were when it was made; seen: how many changes there had been.
    """

    groups: list[_Group]
    sizes: list[int] | None
    back: Tensor | None
    adapters: Adapters
    mentioned: tuple[str, ...]
    held: list[Adapter | None]
    seen: int

    def holds(self) -> bool:
        """Whether the site has the adapters that it was made for."""
        if torch.compiler.is_compiling():  # the count would become a condition of the graph
            return True
        if self.seen != changes[0] and [*map(self.adapters.get, self.mentioned)] == self.held:
            self.seen = changes[0]
        return self.seen == changes[0]

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
    plan: _Partition | None = rows._cache.get(key)
    if plan is not None and not plan.holds():  # attached or detached since, while another route was in use
        rows._cache.clear()
        plan = None
    if plan is None:
        ids = rows.for_leading(x.shape[0], exact=x.ndim != 2, expand=expand)
        groups, order = [], []
        for routes in _groups(rows, adapters):
            where = [n for n, i in enumerate(ids) if i in routes]
            order += where
            groups.append(_group(rows, routes, where, [routes.index(ids[n]) for n in where], x, op, adapters))
        in_order = order == [*range(len(ids))]
        back = None if in_order else torch.tensor(order, device=x.device).argsort()
        mentioned = (*sorted(names(rows)),)
        held = [*map(adapters.get, mentioned)]
        sizes = [len(g.where) for g in groups] if in_order else None
        plan = rows._cache[key] = _Partition(groups, sizes, back, adapters, mentioned, held, changes[0])
    return plan


def _group(
    rows: Rows, numbers: list[int], where: list[int], local: list[int], x: Tensor, op: DataOp, adapters: Adapters
) -> _Group:
    """Rows of one adapter that stand together make blocks, as large as all such runs allow."""
    size = math.gcd(*(len([*run]) for _, run in groupby(local)))
    blocks, device = local[::size], x.device
    ids = None if blocks == [*range(len(numbers))] else torch.tensor(blocks, device=device)
    routes = [rows.routes[i] for i in numbers]
    here = set().union(*map(names, routes)) & adapters.keys()
    stacked = None
    if here and len(routes) > 1:
        members = [adapters[r] for r in routes]
        stacked = rows._cache.setdefault(("stack", *map(id, members)), Stacked(members))
    direct, reads_batch = _is_direct(routes[0], x[:1], op, adapters), any(adapters[a].method.reads_batch for a in here)
    return _Group(
        routes, torch.tensor(where, device=device), ids, len(blocks), bool(here), stacked, direct, reads_batch
    )


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


def _run_group(group: _Group, x: Tensor, op: DataOp, frozen: Op, adapters: Adapters) -> Tensor:
    """One group's rows through its adapters. frozen: what computes the map itself."""
    if not group.present:
        return frozen(x)
    if group.stacked is not None:
        gather = Gather(op, group.ids, group.num_blocks, frozen)
        y: Tensor = value(run(group.stacked.members[0].method, group.stacked.coefficients(op), x, reading(gather, x)))
        return y
    if isinstance(group.routes[0], str):
        adapter = adapters[group.routes[0]]
        return run(adapter.method, adapter.coefficients(op, keep=True), x, frozen)
    return apply(group.routes[0], x, frozen, adapters)
