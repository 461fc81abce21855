"""Routes: which adapters apply to which rows. One mechanism for switching, blending, nesting and mixed batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weft.core.adapter import Adapted, Adapter, Once, plain_parameters, run
from weft.core.affine import WeightOp
from weft.core.gather import Gather
from weft.core.op import DataOp, Op

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


Route = None | str | Stack | Blend | Rows


def as_route(value: Any) -> Route:
    """None, a name, {name: weight}, a list with one route per row, or a route; TypeError for anything else."""
    if value is None or isinstance(value, str | Stack | Blend | Rows):
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
        "or a list with one of these per row"
    )


def names(route: Route) -> set[str]:
    """Every adapter a route mentions."""
    match route:
        case None:
            return set()
        case str():
            return {route}
        case Stack(routes=parts) | Rows(routes=parts):
            return set().union(*(names(r) for r in parts))
        case Blend(weights=weights):
            return set().union(*(names(r) for r, _ in weights))


def apply(route: Route, x: Any, op: Op, adapters: Adapters, expand: int = 1) -> Any:
    """x through `op` under a route. An adapter that is not at this site leaves the map as it is."""
    if route is None:
        return op(x)
    if isinstance(route, str):
        adapter = adapters.get(route)
        return op(x) if adapter is None else adapter.run(x, op, keep=isinstance(op, DataOp))
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
    ids = rows.for_leading(x.shape[0], exact=x.ndim != 2, expand=expand)
    pieces, order = [], []
    for group, where, local in _partition(rows, ids, adapters, x.device):
        part = x if len(where) == len(ids) else x.index_select(0, where)
        pieces.append(_run_group(rows, group, part, op, local, adapters))
        order.append(where)
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces).index_select(0, torch.cat(order).argsort())


def _partition(rows: Rows, ids: tuple[int, ...], adapters: Adapters, device: torch.device) -> list[Any]:
    """(routes, their rows, which route each of these rows uses) for every group that one call can serve."""
    key = ("partition", id(adapters), ids, device)
    if key not in rows._cache:
        found = []
        for group in _groups(rows, adapters):
            where = [n for n, i in enumerate(ids) if i in group]
            local = torch.tensor([group.index(ids[n]) for n in where], device=device)
            found.append((group, torch.tensor(where, device=device), local))
        rows._cache[key] = found
    return rows._cache[key]


def _groups(rows: Rows, adapters: Adapters) -> list[list[int]]:
    """Routes that one stacked call can serve: the same method with tensors of the same shapes, or no adapter here."""
    groups: dict[Any, list[int]] = {}
    for i, route in enumerate(rows.routes):
        key: Any = i
        if not names(route) & adapters.keys():
            key = None
        elif isinstance(route, str):
            adapter = adapters[route]
            key = (adapter.method, tuple((k, t.shape, t.dtype) for k, t in adapter.tensors().items()))
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _run_group(rows: Rows, group: list[int], x: Tensor, op: DataOp, ids: Tensor, adapters: Adapters) -> Tensor:
    routes = [rows.routes[i] for i in group]
    if not names(routes[0]) & adapters.keys():
        return op(x)
    if len(group) == 1:
        return apply(routes[0], x, op, adapters)
    members = [adapters[r] for r in routes]
    return run(members[0].method, _stacked(rows, members, op), x, Gather(op, ids))


def _stacked(rows: Rows, members: list[Adapter], op: DataOp) -> Mapping[str, Tensor]:
    """The coefficients of several adapters, stacked [K, ...]; kept between calls while no gradient is wanted."""
    made_of = [t for a in members for t in a.tensors().values()] + [t for _, _, t in plain_parameters(op)]
    # tensors of torch's inference mode count no versions
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(t.is_inference() for t in made_of):
        each = [a.coefficients(op) for a in members]
        return {k: torch.stack([c[k] for c in each]) for k in each[0]}
    key = ("stack", *map(id, members))
    versions = [*(a.age for a in members), *((t.data_ptr(), t._version) for t in made_of)]
    if key not in rows._cache or rows._cache[key][0] != versions:
        each = [a.coefficients(op, keep=True) for a in members]
        rows._cache[key] = versions, {k: torch.stack([c[k] for c in each]) for k in each[0]}
    return rows._cache[key][1]
