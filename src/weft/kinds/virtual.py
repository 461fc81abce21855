"""Virtual tokens: what adapters put beside an input instead of changing a weight, and how rows of a batch share it.

A body at such a site does not compute; it says what it wants (a `Virtual`), and the seat carries it out in one call.
So one route, a stack and a batch of different adapters are all the same: gather the wishes, then run the module once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from weft.core.adapter import Adapter
from weft.core.given import Given, known
from weft.core.op import DataOp
from weft.core.route import Route, Rows, Stack, Weighted, apply, names
from weft.kinds.seat import Seat

UNMERGEABLE = "virtual tokens are inputs, and no weight can express them; serve the adapter unmerged"


@dataclass(frozen=True, eq=False)
class Virtual:
    """What the adapters of a route add at one site.

    ahead: groups of rows that come first, in order; each group is one [N, C] tensor per stream (an attention prefix
        has two: keys and values; a prompt has one, and may say beside it of which tokens its rows are, [N, 1], and what
        a loss on these counts, [N, 1]).
    gated: hidden states [N, I] that are attended to beside the input, each with its gate [1].
    """

    ahead: tuple[tuple[Tensor, ...], ...] = ()
    gated: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def num_ahead(self) -> int:
        """How many rows come first."""
        return sum(group[0].shape[0] for group in self.ahead)

    def stream(self, index: int) -> Tensor | None:
        """The rows that come first, of one stream, [N, C]."""
        return torch.cat([group[index] for group in self.ahead]) if self.ahead else None

    def answers(self) -> tuple[Tensor, Tensor] | None:
        """Of a prompt's rows the tokens [N] and what a loss on them counts [N]; None where nothing counts."""
        if all(len(group) < 3 for group in self.ahead):
            return None
        told = [g[1:] if len(g) == 3 else (g[0].new_zeros(len(g[0]), 1).long(), g[0][:, :1] * 0) for g in self.ahead]
        ids, weights = (torch.cat(each).squeeze(1) for each in zip(*told, strict=True))
        return ids, weights

    def _refuse(self, other: Any) -> NoReturn:
        raise TypeError(
            "virtual tokens cannot be weighted or added up: a blend of prompts is no prompt that was trained. "
            "Use one of them, weft.Stack of several (all their tokens), or one per row"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse


class VirtualOp(DataOp):
    """The op of a site that virtual tokens join: the map itself changes nothing about them."""

    def __call__(self, x: Any) -> Any:
        return x

    def prepend(self, y: Any, *rows: Tensor) -> Any:
        return replace(y, ahead=(rows, *y.ahead))

    def attend(self, y: Any, hidden: Tensor, gate: Tensor) -> Any:
        return replace(y, gated=(*y.gated, (hidden, gate)))

    def given(self, x: Any, name: str, count: int) -> Tensor:
        return self.source.given(name, count)


@dataclass(frozen=True, eq=False)
class Cases:
    """The distinct things that rows of a batch ask for: a route and what is given; which: for every row, which case."""

    routes: tuple[Route, ...]
    given: tuple[Mapping[str, Given], ...]
    which: tuple[int, ...] | None = None
    _ids: dict[Any, Tensor] = field(default_factory=dict)

    def ids(self, size: int, expand: int, device: torch.device) -> Tensor | None:
        """`which` as a tensor for the `size` rows of a batch, of which a generation has `expand` for each."""
        if self.which is None:
            return None
        key = size, expand, device
        if key not in self._ids:
            rows = Rows(self.routes, self.which).for_leading(size, exact=True, expand=expand)
            self._ids[key] = torch.tensor(rows, device=device)
        return self._ids[key]


def cases_of(route: Route, given: Mapping[str, Given]) -> Cases:
    """The cases of a route and of what is given for each row."""
    given = {name: each for name, each in given.items() if each.values.ndim}
    if not given:
        return (
            Cases(route.routes, ({},) * len(route.routes), route.ids)
            if isinstance(route, Rows)
            else Cases((route,), ({},))
        )
    if any(each.values.ndim == 2 for each in given.values()):
        raise ValueError("virtual tokens cannot come before the single rows of a packed sequence: pad the rows instead")
    columns = [each.values.tolist() for each in given.values()]
    rows = [route.routes[i] for i in route.ids] if isinstance(route, Rows) else [route] * len(columns[0])
    if {len(column) for column in columns} != {len(rows)}:
        raise ValueError(
            f"the route has {len(rows)} rows, and {', '.join(given)} {[len(c) for c in columns]}: give one per row"
        )
    distinct = [*dict.fromkeys(zip(rows, *columns, strict=True))]
    which = tuple(distinct.index(each) for each in zip(rows, *columns, strict=True))
    given_each = [
        {n: Given(g.values[which.index(k)], g.largest) for n, g in given.items()} for k in range(len(distinct))
    ]
    return Cases(tuple(r for r, *_ in distinct), tuple(given_each), which)


class VirtualSeat(Seat):
    """A seat whose adapters add virtual tokens; it has no weight of its own that could be merged into."""

    has_weight = False
    case: Mapping[str, Given] | None = {}
    """What is given in the case that is being asked about; None: any will do."""

    def make_op(self) -> VirtualOp:
        return VirtualOp(self.site, self)

    def weight(self) -> Tensor:
        raise TypeError(f"{self.site.address} has no weight of its own: {UNMERGEABLE}")

    stored = weight

    def bias(self) -> Tensor | None:
        return None

    def value(self, route: Route) -> Any:
        raise TypeError(UNMERGEABLE)

    def given(self, name: str, count: int) -> Tensor:
        if self.case is None:  # an adapter is looked at before anything is given
            return torch.zeros((), dtype=torch.long, device=self.site.device)
        return known({**self.weave.given, **self.case}, name, count, self.site.address).values

    def cases(self) -> Cases:
        """What the rows in use ask for: one case, unless they differ in their route or in what is given for them."""
        weave, last = self.weave, self.weave.cases
        if last is None or last[0] is not weave.route or last[1] is not weave.given:
            last = weave.cases = weave.route, weave.given, cases_of(weave.route, weave.given)
        found: Cases = last[2]
        return found

    def routes(self) -> tuple[Route, ...]:
        """The route of each case."""
        return self.cases().routes

    def wishes(self) -> list[Virtual]:
        """What each case adds here."""
        found, cases = [], self.cases()
        try:
            for route, self.case in zip(cases.routes, cases.given, strict=True):
                found.append(apply(route, Virtual(), self.op, self.adapters))
        finally:
            self.case = {}
        return found

    def counts(self) -> tuple[int, ...]:
        """How many rows come first in each case, without computing them."""
        present = self.adapters
        return tuple(sum(num_ahead(present[n]) for n in names(r) if n in present) for r in self.routes())

    def ids(self, size: int, device: torch.device) -> Tensor | None:
        """For every row of a batch, which case it is; None when there is only one."""
        return self.cases().ids(size, self.weave.expand, device)


def num_ahead(adapter: Adapter) -> int:
    """How many rows an adapter puts first."""
    return adapter.__dict__["num_ahead"]


@torch.no_grad()
def measure(seat: VirtualSeat, name: str) -> None:
    """Note how many rows an adapter puts first, which only its body knows."""
    adapter = seat.adapters[name]
    seat.case = None
    try:
        adapter.__dict__["num_ahead"] = adapter.run(Virtual(), seat.op).num_ahead
    finally:
        seat.case = {}


def check_blend(route: Route, seats: Sequence[VirtualSeat]) -> None:
    """TypeError for a weighted sum that holds virtual tokens."""
    match route:
        case Stack(routes=parts) | Rows(routes=parts):
            for part in parts:
                check_blend(part, seats)
        case Weighted():
            if any(names(route) & seat.adapters.keys() for seat in seats):
                Virtual()._refuse(None)


def batched(parts: Sequence[Tensor | None], ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """[N, C] rows of each distinct route -> [B or 1, N, C] with shorter ones padded at the front, and which are real.

    The mask [B, N] is None when every row of the batch has all of them.
    """
    if ids is None:
        return (None if parts[0] is None else parts[0].unsqueeze(0)), None
    known = [p for p in parts if p is not None]
    if not known:
        return None, None
    size = max(len(p) for p in known)
    full = []
    for part in parts:
        part = known[0][:0] if part is None else part
        full.append(torch.cat([part.new_zeros(size - len(part), part.shape[1]), part]))
    counts = tuple(0 if p is None else len(p) for p in parts)
    return torch.stack(full)[ids], real(counts, ids)


def real(counts: Sequence[int], ids: Tensor | None) -> Tensor | None:
    """Which of the leading rows each row of the batch has, [B, N]; None when all have all."""
    if ids is None or len(set(counts)) == 1:
        return None
    size = max(counts)
    own = torch.tensor(counts, device=ids.device)[ids].unsqueeze(1)  # [B, 1]
    return torch.arange(size, device=ids.device) >= size - own


def per_row(counts: Sequence[int], ids: Tensor | None) -> int | Tensor:
    """A number for every row of the batch, [B, 1], or one for all."""
    if ids is None or len(set(counts)) == 1:
        return counts[0]
    return torch.tensor(counts, device=ids.device)[ids].unsqueeze(1)
