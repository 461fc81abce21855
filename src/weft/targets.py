"""Targets: patterns become an explicit plan of sites, before anything is touched."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn

from weft.core.adapter import Adapter, Shared
from weft.core.affine import NotLinear, StartOp, WeightOp
from weft.core.method import Frozen, Method
from weft.core.router import Router, shared_tensors
from weft.core.site import Site
from weft.errors import WeftError, nearest
from weft.kinds import Offer
from weft.kinds.seat import base_class
from weft.kinds.settle import input_of
from weft.patterns import PLACES, PRESETS, Candidate, Index, candidates, layer_of, output_head, walk
from weft.registry import as_declared, method_class, method_from_spec

__all__ = [
    "PRESETS", "Plan", "PlannedSite", "TargetError", "Targets", "candidates", "resolve", "site_of", "structure", "walk",
]  # fmt: skip

Targets = str | Sequence[str] | Mapping[str, Mapping[str, Any]]


class TargetError(WeftError, ValueError):
    """Targets that match nothing, match in part, or match what the method cannot adapt."""


@dataclass(frozen=True)
class PlannedSite:
    """One site of a plan: where, what goes there, and how the module will be read."""

    site: Site
    method: Method
    path: str
    offer: Offer

    @cached_property
    def num_parameters(self) -> int:
        """Trainable numbers that this site adds."""
        return trainable(structure(self.method, self.site))


@dataclass(frozen=True)
class Plan:
    """What an attach will do: every site with its method and shape."""

    name: str
    method: Method
    sites: tuple[PlannedSite, ...]
    targets: Any = None
    tied: str = "refuse"

    @property
    def num_parameters(self) -> int:
        """Trainable numbers of the whole adapter."""
        return sum(s.num_parameters for s in self.sites) + sum(map(trainable, self.shared("meta").values()))

    def shared(
        self, device: torch.device | str | None = None, ops: Mapping[str, StartOp] | None = None
    ) -> dict[str, dict[str, Frozen | torch.Tensor]]:
        """What its sites share, by the name of their method; there, or on a device.

        ops: the start of every site by address; without them, what is made of weights has its shapes only.
        """
        uses: dict[str, list[tuple[Method, Site, StartOp | None]]] = {}
        for s in self.sites:
            site = s.site if device is None else dataclasses.replace(s.site, device=device)
            uses.setdefault(s.method.name, []).append((s.method, site, (ops or {}).get(s.site.address)))
        made = {name: shared_tensors(own) for name, own in uses.items() if any(m.shares() for m, _, _ in own)}
        return {name: tensors for name, tensors in made.items() if tensors}

    def __str__(self) -> str:
        rows = [("module", "kind", "out", "in", "method", "parameters")]
        for s in self.sites:
            shape = (str(s.site.out_features), str(s.site.in_features))
            rows.append((s.site.address, s.site.kind, *shape, s.method.name, f"{s.num_parameters:,}"))
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        lines.append(f"{self.name}: {self.method} at {len(self.sites)} sites, {self.num_parameters:,} parameters")
        return "\n".join(lines)


def resolve(
    model: nn.Module,
    method: Method,
    targets: Targets | None = None,
    *,
    name: str = "default",
    layers: str | Collection[int] | None = None,
    exclude: Sequence[str] = (),
    save_modules: Sequence[str] = (),
    through: str = "auto",
    tied: str = "refuse",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Plan:
    """Turn targets into a plan; nothing is changed.

    targets: a preset (see PRESETS), a module name, path or glob (`*.q_proj`), a regular expression (`re:...`), a list
        of these of which every one must match, or {pattern: {hyper-parameter: value}}, where `method` names another
        method for these sites: one adapter may hold several. None: the method's own default, "all-linear" for most.
    layers: keep sites in these layers only (`"4-7"`, `"0,2"`, or numbers).
    exclude: patterns to leave out; each must match something.
    save_modules: modules trained in full beside the method (a new head).
    through: "auto", or "weight" to adapt the weight itself where a neighbour reads it without calling the module.
    tied: what to do at a weight that two modules share, see `weft.attach`.
    Raises TargetError for a pattern that matches nothing, and for a site that the method cannot adapt.
    """
    targets = method.default_targets if targets is None else targets
    places = candidates(model)
    index = Index(places, output_head(model))
    chosen: dict[str, tuple[Candidate, Method]] = {}
    for pattern, overrides in _patterns(targets).items():
        here = _override(method, overrides, pattern)
        hits = index.named(pattern, here)
        if not hits:
            raise TargetError(_no_match(pattern, places, model, here))
        for c in hits:
            chosen.setdefault(c.address, (c, here))
    wanted = _layers(layers)
    if wanted is not None:
        chosen = {a: v for a, v in chosen.items() if layer_of(a) in wanted}
        if not chosen:
            raise TargetError(
                f"layers={layers!r} leaves none of the matched sites; the model has {_layer_range(places)}"
            )
    for pattern in exclude:
        out = [c.address for c in index.named(pattern, None) if chosen.get(c.address, (None,))[0] is c]
        if not out:
            raise TargetError(f"exclude={pattern!r} matches none of the chosen sites")
        for address in out:
            del chosen[address]
    chosen = _that_adapt(chosen)
    for pattern in save_modules:
        for c in _whole(pattern, places, model):
            chosen[c.address] = (c, _full())
    if not chosen:
        raise TargetError(f"targets={targets!r}: nothing is left to adapt")
    planned = [_planned(c, m, i, len(chosen), through, dtype, seed) for i, (c, m) in enumerate(chosen.values())]
    _check_inputs(planned, model)
    _check_shared(planned)
    return Plan(name, method, tuple(planned), targets, tied)


def _that_adapt(chosen: dict[str, tuple[Candidate, Method]]) -> dict[str, tuple[Candidate, Method]]:
    """The matched sites at which their method takes part; each method counts its own."""
    own: dict[str, list[str]] = {}
    for address, (_, m) in chosen.items():
        own.setdefault(m.name, []).append(address)
    try:
        out = {a for each in own.values() for i, a in enumerate(each) if not chosen[a][1].adapts(i, len(each))}
    except ValueError as error:
        raise TargetError(str(error)) from error
    return {a: v for a, v in chosen.items() if a not in out}


def _check_inputs(planned: Sequence[PlannedSite], model: nn.Module) -> None:
    """One input at a time gets virtual tokens, and attentions with a prefix need an input that counts it."""
    inputs = [s.site.address for s in planned if s.site.kind == "input"]
    if len(inputs) > 1:
        raise TargetError(
            f"this model has several inputs, and virtual tokens go to one of {', '.join(inputs)}: name it"
        )
    attentions = [s for s in planned if s.site.kind == "attention"]
    if attentions:
        modules = dict(walk(model))
        for s in attentions:
            try:
                input_of(s.path, modules)
            except ValueError as error:
                raise TargetError(f"{s.method.name} cannot adapt {s.site.address}: {error}") from error


def _check_shared(planned: Sequence[PlannedSite]) -> None:
    """A method whose sites share tensors has one set of hyper-parameters."""
    by_name: dict[str, set[Method]] = {}
    for s in planned:
        by_name.setdefault(s.method.name, set()).add(s.method)
    for name, variants in by_name.items():
        if len(variants) > 1 and not all(isinstance(m, Router) or not m.shares() for m in variants):
            raise TargetError(
                f"{name} shares tensors between its sites, so its hyper-parameters cannot differ by pattern; attach "
                "one adapter per setting and use them together"
            )


def _patterns(targets: Targets) -> dict[str, Mapping[str, Any]]:
    if isinstance(targets, str):
        return {targets: {}}
    if isinstance(targets, Mapping):
        return dict(targets)
    return {t: {} for t in targets}


def _override(method: Method, overrides: Mapping[str, Any], pattern: str) -> Method:
    if "method" in overrides:
        return _another(overrides, pattern)
    if not overrides:
        return method
    known = [f.name for f in dataclasses.fields(method)]
    for key in overrides:
        if key not in known:
            raise TargetError(f"targets[{pattern!r}]: {method.name} has no option {key!r}; {nearest(key, known)}")
    try:
        return dataclasses.replace(method, **as_declared(type(method), overrides))
    except (ValueError, TypeError) as error:
        raise TargetError(f"targets[{pattern!r}]: {error}") from error


def _another(overrides: Mapping[str, Any], pattern: str) -> Method:
    """The method that a pattern names, with its own defaults."""
    options = {key: value for key, value in overrides.items() if key != "method"}
    try:
        return method_from_spec({"name": overrides["method"], **options})
    except (ValueError, TypeError) as error:
        raise TargetError(f"targets[{pattern!r}]: {error}") from error


def _no_match(pattern: str, places: list[Candidate], model: nn.Module, method: Method | None = None) -> str:
    other = next(iter(Index(places, None).named(pattern, None)), None)
    if method is not None and other is not None:
        return _cannot(method, other)
    known = sorted({c.address.rsplit(".", 1)[-1] for c in places if c.kind not in PLACES})
    blocks = sorted({c.address.rsplit(".", 1)[-1] for c in places if c.kind == "block" and c.address})
    if pattern == "self-attention":
        return (
            f"no attention of {type(model).__name__} joins its keys and values through a cache that it is given, as "
            "those of decoders such as Llama or GPT-2 and of BERT do; prefixes and LLaMA-Adapter need one"
        )
    if pattern == "side":
        return (
            f"{type(model).__name__} is no decoder whose layers end in one norm, as those of Llama or GPT-2 do: a side "
            "network has no place where it could join"
        )
    hint = "" if pattern in PRESETS else nearest(pattern, [*known, *blocks, *PRESETS])
    return (
        f"target {pattern!r} matches no module of {type(model).__name__}{f'; {hint}' if '?' in hint else '.'} "
        f"It has {', '.join(known) or 'nothing to adapt'}; presets are {', '.join(PRESETS)}"
    )


def _cannot(method: Method, c: Candidate) -> str:
    where = f"{c.address or 'the model itself'} ({base_class(c.module).__name__}, kind {c.kind})"
    return f"{method.name} cannot adapt {where}; it adapts: {', '.join(sorted(method.kinds))}"


def _planned(
    c: Candidate, method: Method, index: int, count: int, through: str, dtype: torch.dtype | None, seed: int
) -> PlannedSite:
    if c.kind not in method.kinds:
        raise TargetError(_cannot(method, c))
    if through not in ("auto", "weight"):
        raise ValueError(f"through={through!r}: expected 'auto' or 'weight'")
    offer = c.offer.read_as_weight() if through == "weight" else c.offer
    site = site_of(c.module, c.address, offer, index=index, count=count, dtype=dtype, seed=seed)
    try:
        method.check(site)
        if method.selects_tokens() and site.kind not in ("linear", "embedding", "block"):
            raise ValueError(f"{method.looks_for}: {site.kind} does not see the tokens of a text one by one")
    except ValueError as error:
        raise TargetError(f"{method.name} cannot adapt {c.address}: {error}") from error
    if offer.through_weight:
        _check_expressible(method, site)
    return PlannedSite(site, method, c.path, offer)


def _check_expressible(method: Method, site: Site) -> None:
    """TargetError where a site is adapted through its weight and no weight expresses the method's map."""
    try:
        expressible(method, dataclasses.replace(site, address="", device="meta", layer=None, index=0, count=1, seed=0))
    except NotLinear as error:
        raise TargetError(
            f"{method.name} cannot adapt {site.address}: it is adapted through its weight, which is read without a "
            f"call of its own, and {method.name} {error}, so no weight can express it; leave it out with exclude, or "
            "adapt the block around it"
        ) from error


@cache
def expressible(method: Method, site: Site) -> bool:
    """Run the merge reading on the meta device; NotLinear when it is not possible."""
    adapter = Adapter(method, site, structure(method, site), Shared(method.shared([site])))
    op = WeightOp(site, torch.empty(weight_shape(site), device="meta"), _meta_bias(site))
    adapter.run(op.input(), op)
    return True


def site_of(
    module: nn.Module,
    address: str,
    offer: Offer,
    *,
    index: int = 0,
    count: int = 1,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Site:
    """The site that an offer makes of a module. Adapters of a low-precision base are float32 unless told otherwise."""
    try:
        shape = offer.seat.shape(module, offer.param)
    except ValueError as error:
        raise TargetError(f"{address} {error}") from error
    stored = module._parameters.get(offer.param)
    if stored is None:
        stored = next((p for p in module.parameters() if p.is_floating_point()), None)
    own = stored.dtype if stored is not None and stored.is_floating_point() else torch.float32
    bias = offer.param.replace("weight", "bias") if "weight" in offer.param else f"{offer.param}_bias"
    return Site(
        address=address,
        kind=offer.kind,
        has_bias=module._parameters.get(bias) is not None,
        dtype=dtype or (own if own.itemsize >= 4 else torch.float32),
        device=stored.device if stored is not None else "cpu",
        index=index,
        count=count,
        layer=layer_of(address),
        seed=seed,
        **shape,
    )


def _layers(layers: str | Collection[int] | None) -> set[int] | None:
    if layers is None:
        return None
    if not isinstance(layers, str):
        return set(layers)
    chosen: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise TargetError(f"layers={layers!r}: expected numbers and ranges such as '4-7' or '0,2,5-6'")
        chosen.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return chosen


def _layer_range(places: list[Candidate]) -> str:
    numbers = {n for c in places if (n := layer_of(c.address)) is not None}
    return f"layers {min(numbers)}-{max(numbers)}" if numbers else "no numbered layers"


def _whole(pattern: str, places: list[Candidate], model: nn.Module) -> list[Candidate]:
    """The leaf sites of a module that is trained in full."""
    roots = [n for n, _ in walk(model) if n == pattern or n.endswith("." + pattern)]
    hits = [c for c in places if c.kind not in PLACES and any(f"{c.path}.".startswith(f"{r}.") for r in roots)]
    if not hits:
        raise TargetError(_no_match(pattern, places, model))
    return hits


def _full() -> Method:
    return method_class("full")()


_STRUCTURES: dict[Any, dict[str, Frozen | torch.Tensor]] = {}


def structure(method: Method, site: Site) -> dict[str, Frozen | torch.Tensor]:
    """The tensors that a method has at a site, on the meta device: names, shapes, and which are frozen."""
    sizes = site.shape, site.in_features, site.groups, site.experts, site.num_layers
    key = (method, site.kind, *sizes, site.has_bias, site.dtype)
    if key not in _STRUCTURES:
        one = dataclasses.replace(site, address="", device="meta", layer=None, index=0, count=1, experts=None)
        op = StartOp(one, lambda: torch.empty(weight_shape(one), device="meta"), lambda: _meta_bias(one))
        made = dict(method.init(one, op))
        if site.experts is not None:
            made = {k: _repeat(v, site.experts) for k, v in made.items()}
        _STRUCTURES[key] = made
    return _STRUCTURES[key]


def _repeat(value: Frozen | torch.Tensor, times: int) -> Frozen | torch.Tensor:
    if isinstance(value, Frozen):
        return Frozen(value.tensor.expand(times, *value.tensor.shape))
    return value.expand(times, *value.shape)


def trainable(tensors: Mapping[str, Frozen | torch.Tensor]) -> int:
    """How many numbers of these tensors train."""
    return sum(t.numel() for t in tensors.values() if not isinstance(t, Frozen) and t.is_floating_point())


def _meta_bias(site: Site) -> torch.Tensor | None:
    return torch.empty(site.out_features, device="meta") if site.has_bias else None


def weight_shape(site: Site) -> tuple[int, ...]:
    """The shape of a site's weight as an op reads it, for one expert."""
    return (site.out_features,) if site.kind == "norm" else site.shape
