"""Routers: methods that hold several adapters of a site, their experts, and decide how much each of them counts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from weft.core.affine import StartOp
from weft.core.evolve import Part, Progress
from weft.core.experts import Experts
from weft.core.method import Frozen, Method, Tensors, option
from weft.core.op import Op
from weft.core.site import Site

__all__ = ["Expert", "Router", "experts", "shared_tensors"]

_OF = ":"
"""Between an expert's name and one of its tensors."""


@dataclass(frozen=True)
class Expert:
    """One of the adapters that a router weighs."""

    name: str
    method: Method


def experts(method: Method, count: int) -> tuple[Expert, ...]:
    """Fresh experts of one method, named by their numbers; each draws a start of its own."""
    return tuple(Expert(str(k), method) for k in range(count))


@dataclass(frozen=True)
class Router(Method):
    """An adapter that is made of others. A subclass says in `route` how they are weighed, with tensors of its own.

    Experts may be of any methods, routers too. They are one adapter with their router: saved, loaded, trained, mixed
    with other rows and counted together. `experts` differ from site to site where adapters of other sites were put
    together.
    """

    kinds = frozenset({"linear", "block"})
    alone = True
    experts: tuple[Expert, ...] = option((), help="the adapters that are weighed: by name, or a method and a count")
    train_experts: bool = option(True, help="train the experts too; otherwise the router alone")

    # what a subclass writes

    def own(self, site: Site, op: StartOp, made: Mapping[str, Tensors]) -> Mapping[str, Tensor | Frozen]:
        """The router's tensors at a site. made: those of its experts, by name; without what they share at first."""
        return {}

    def own_shared(self, sites: Sequence[Site]) -> Mapping[str, Tensor | Frozen]:
        """The router's tensors for all sites."""
        return {}

    def own_penalty(self, t: Tensors, site: Site) -> Tensor | None:
        """What training minimises of the router's own tensors."""
        return None

    def route(self, t: Tensors, x: Any, op: Experts) -> Any:
        """The map under its experts: mostly `op.mix(x, gates)`."""
        raise NotImplementedError

    def check_experts(self) -> None:
        """Raise ValueError for experts that cannot be weighed together."""
        names = [e.name for e in self.experts]
        if not names:
            raise ValueError(
                f"{self.name} has no experts to weigh: give experts, or put adapters together with weft.join"
            )
        for name in names:
            if not re.fullmatch("[A-Za-z0-9_-]+", name) or names.count(name) > 1:
                raise ValueError(f"an expert is named {name!r}: use letters, digits, '_' and '-', and a name only once")

    def over(self, some: tuple[Expert, ...]) -> Router:
        """The same router over some experts only: those that are at one site."""
        return dataclasses.replace(self, experts=some)

    # the protocol of a method, over all experts

    @property
    def surveys(self) -> bool:  # type: ignore[override]
        return any(e.method.surveys for e in self.experts)

    @property
    def conditions(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(c for e in self.experts for c in e.method.conditions))

    @property
    def random(self) -> bool:  # type: ignore[override]
        return any(e.method.random for e in self.experts)

    @property
    def changes_start(self) -> bool:  # type: ignore[override]
        return any(e.method.changes_start for e in self.experts)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return tuple((e.name + _OF + a, e.name + _OF + b) for e in self.experts for a, b in e.method.pairs)

    @property
    def copies(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(e.name + _OF + key for e in self.experts for key in e.method.copies)

    @property
    def aside(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(e.name + _OF + key for e in self.experts for key in e.method.aside)

    def check(self, site: Site) -> None:
        self.check_experts()
        for e in self.experts:
            if site.kind not in e.method.kinds:
                kinds = ", ".join(sorted(e.method.kinds))
                raise ValueError(f"expert {e.name} is a {e.method.name}, which adapts {kinds} and no {site.kind}")
            e.method.check(site)

    def needs(self) -> frozenset[str]:
        return frozenset().union(*(e.method.needs() for e in self.experts))

    def shares(self) -> bool:
        return type(self).own_shared is not Router.own_shared or any(e.method.shares() for e in self.experts)

    def shared(self, sites: Sequence[Site]) -> Mapping[str, Tensor | Frozen]:
        return shared_tensors([(self, site, None) for site in sites])

    def init(self, site: Site, op: StartOp) -> Mapping[str, Tensor | Frozen]:
        made = {e.name: e.method.init(_as_expert(site, e), op) for e in self.experts}
        return self.started(site, op, made)

    def started(
        self,
        site: Site,
        op: StartOp,
        made: Mapping[str, Mapping[str, Tensor | Frozen]],
        shared: Mapping[str, Tensors] = MappingProxyType({}),
    ) -> Mapping[str, Tensor | Frozen]:
        """A site's tensors where those of its experts are there already. shared: what these share with other sites."""
        plain = {n: {k: v.tensor if isinstance(v, Frozen) else v for k, v in t.items()} for n, t in made.items()}
        plain = {n: {**shared.get(n, {}), **t} for n, t in plain.items()}
        return {**self._together(made), **self.own(site, op, plain)}

    def coefficients(self, t: Tensors, op: Op) -> Tensors:
        apart = self._apart(t)
        made = {e.name: e.method.coefficients(apart[e.name], op) for e in self.experts}
        return {**{k: v for k, v in t.items() if _OF not in k}, **_named(made)}

    def penalty(self, t: Tensors, site: Site) -> Tensor | None:
        apart = self._apart(t)
        each = [e.method.penalty(apart[e.name], site) for e in self.experts]
        wanted = [p for p in (*each, self.own_penalty(t, site)) if p is not None]
        return sum(wanted[1:], start=wanted[0]) if wanted else None

    def evolves(self) -> bool:
        return any(e.method.evolves() for e in self.experts)

    def evolve(self, parts: Sequence[Part], progress: Progress) -> None:
        for e in self.experts:
            if e.method.evolves():
                with _within(parts, e.name) as own:
                    e.method.evolve(own, progress)

    def forward(self, c: Tensors, x: Any, op: Op) -> Any:
        apart = self._apart(c)
        return self.route(c, x, Experts(op, {e.name: (e.method, apart[e.name]) for e in self.experts}))

    def spec(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"name": self.name, **plain, "experts": {e.name: e.method.spec() for e in self.experts}}

    def __str__(self) -> str:
        kinds = [str(e.method) for e in self.experts]
        return f"{self.name} of {', '.join(f'{kinds.count(kind)} x {kind}' for kind in dict.fromkeys(kinds))}"

    def _together(self, made: Mapping[str, Mapping[str, Tensor | Frozen]]) -> dict[str, Tensor | Frozen]:
        found = _named(made)
        if self.train_experts:
            return found
        return {k: v if isinstance(v, Frozen) else Frozen(v) for k, v in found.items()}

    def _apart(self, t: Tensors) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {e.name: {} for e in self.experts}
        for key, tensor in t.items():
            name, of, inner = key.partition(_OF)
            if of and name in found:  # what sites share is there for experts of other sites too
                found[name][inner] = tensor
        return found


def _named(made: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name}{_OF}{key}": v for name, t in made.items() for key, v in t.items()}


def shared_tensors(uses: Sequence[tuple[Method, Site, StartOp | None]]) -> dict[str, Tensor | Frozen]:
    """What the sites of one kind of method share, of each site its method: routers may have other experts elsewhere.

    With the op of every site it is what they start with; without, tensors of the same shapes.
    """
    method, sites, ops = uses[0][0], [site for _, site, _ in uses], [op for _, _, op in uses if op is not None]
    if not isinstance(method, Router):
        return dict(method.shared_start(sites, ops) if ops else method.shared(sites))
    by_name: dict[str, list[tuple[Method, Site, StartOp | None]]] = {}
    for router, site, op in uses:
        assert isinstance(router, Router), "these are of one kind"
        for e in router.experts:
            by_name.setdefault(e.name, []).append((e.method, _as_expert(site, e), op))
    made = {name: shared_tensors(own) for name, own in by_name.items()}
    every = {e.name: e for router, _, _ in uses for e in router.experts}  # type: ignore[attr-defined]
    return {**method._together(made), **method.over(tuple(every.values())).own_shared(sites)}


@contextmanager
def _within(parts: Sequence[Part], name: str) -> Iterator[list[Part]]:
    """Parts with one expert's tensors and memory, by their names in its method."""
    prefix = name + _OF
    own = []
    for part in parts:
        tensors = {k.removeprefix(prefix): t for k, t in part.tensors.items() if k.startswith(prefix)}
        state = {_renamed(k, prefix, ""): part.state.pop(k) for k in [*part.state] if _last(k).startswith(prefix)}
        own.append(Part(part.site, tensors, state, lambda k, where, p=part: p.restart(prefix + k, where)))  # type: ignore[misc]
    yield own
    for part, inner in zip(parts, own, strict=True):
        part.state.update({_renamed(k, "", prefix): t for k, t in inner.state.items()})


def _last(key: str) -> str:
    """What a part remembers of a tensor ends in the tensor's name."""
    return key.rpartition(".")[2]


def _renamed(key: str, before: str, after: str) -> str:
    last = _last(key)
    return key.removesuffix(last) + after + last.removeprefix(before)


def _as_expert(site: Site, expert: Expert) -> Site:
    """The site as one expert sees it: its draws are its own."""
    return dataclasses.replace(site, address=f"{site.address}{_OF}{expert.name}")
