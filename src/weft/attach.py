"""Attaching adapters to a model, switching, merging, and the inverse of each: the only room that changes a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from weft.calibrate import collect
from weft.core.adapter import Adapter
from weft.core.affine import NotLinear
from weft.core.method import Frozen, Method
from weft.core.route import Route, Rows, as_route, names
from weft.errors import AdapterError, nearest
from weft.fresh import Record, dealt, make
from weft.kinds.root import WovenGenerator, WovenRoot
from weft.kinds.seat import Container, Seat, Weave, Woven, WovenWeight, base_class, swap, unswap, woven_class
from weft.kinds.settle import check_places, leave, leave_sides, settle
from weft.kinds.tied import check_ties, retie, share_ties, untie
from weft.kinds.virtual import check_blend
from weft.targets import Plan, PlannedSite, Targets, resolve, walk

__all__ = [
    "AdapterError", "Record", "adapters", "attach", "attach_plan", "detach", "foldable", "free_name", "merge",
    "parameters", "records", "unmerge", "use", "using", "weave_of",
]  # fmt: skip


_ROOT_NAMES = frozenset({"weave", "records", "was_trainable", "inner_forward", "inner_mixin", "fingerprint"})
"""Attributes that the adapted model itself has beside those of every adapted module."""


def weave_of(model: nn.Module) -> Weave:
    """The adapter state of a model; AdapterError when nothing was ever attached to it."""
    weave = model.__dict__.get("weave")
    if weave is None:
        raise AdapterError(f"no adapter is attached to this {type(model).__name__}; weft.attach or weft.load one first")
    return weave


def records(model: nn.Module) -> dict[str, Record]:
    """Every named adapter of a model."""
    return model.__dict__.get("records", {})


def adapters(model: nn.Module) -> dict[str, Plan]:
    """The plan of every adapter that a model carries, by name."""
    return {name: r.plan for name, r in records(model).items()}


def free_name(model: nn.Module, name: str) -> str:
    """The name, or one like it, that no adapter of the model has."""
    while name in records(model):
        name += "_"
    return name


def attach(
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
    calibration: Iterable[Any] | None = None,
) -> Plan:
    """Put a new adapter on a model, freeze the base, and use the adapter; returns what was adapted.

    model: any torch module. Its parameter names, types and state-dict keys stay; `<module>.adapters.<name>.*` is new.
    targets, layers, exclude, save_modules, through: see `weft.resolve`.
    tied: what to do at a weight that two modules share: "refuse", "share" (both see the adapter), or "separate"
        (only the targeted module does; merging then gives it a weight of its own).
    dtype: of the adapter's tensors; by default the base's, and float32 on a base of lower precision.
    calibration: batches (mappings or tuples of the model's arguments) for starts that need statistics of data.
    Raises TargetError or AdapterError before anything is changed.
    """
    plan = resolve(
        model, method, targets, name=name, layers=layers, exclude=exclude, save_modules=save_modules,
        through=through, tied=tied, dtype=dtype, seed=seed,
    )  # fmt: skip
    if calibration is not None and not any(s.method.needs() for s in plan.sites):
        raise ValueError(f"{method} starts from no data: leave calibration out, or choose a start that needs it")
    record = attach_plan(model, plan, statistics=collect(model, plan, calibration))
    use(model, name)
    return record.plan


def attach_plan(
    model: nn.Module,
    plan: Plan,
    *,
    tensors: Mapping[str, Mapping[str, Tensor | Frozen]] | None = None,
    shared: Mapping[str, Mapping[str, Tensor | Frozen]] | None = None,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Record:
    """Carry out a plan. tensors, shared: ready ones by address and by method name, instead of fresh ones."""
    modules = dict(walk(model))
    if tensors is None:
        plan = dealt(plan, modules, statistics or {})
    _check_free(model, [modules[p.path] for p in plan.sites])
    _check_name(model, plan.name)
    places = [(p.site.address, modules[p.path], p.offer.param) for p in plan.sites]
    check_ties(places, modules, plan.tied)
    if model.__dict__.get("weave") is not None and weave_of(model).merged is not None:
        raise AdapterError(f"{weave_of(model).merged!r} is merged into the weights; unmerge before attaching")
    check_places((p.site.address, modules[p.path], p.offer.mixin) for p in plan.sites)
    made = make(plan, modules, tensors, shared, statistics or {})
    if "weave" not in model.__dict__:
        _adopt(model)
    weave = weave_of(model)
    for planned in plan.sites:
        seat = _seat(modules[planned.path], planned, weave)
        adapter = made.adapters[planned.site.address]
        _register(seat, plan.name, adapter)
    for method_name, holder in made.shared.items():
        _container(model, plan.name)._modules[method_name] = holder
    if plan.tied == "share":
        share_ties(places, modules, weave)
    settle(model, modules, weave, plan.name)
    records(model)[plan.name] = made
    if isinstance(weave.route, Rows):
        weave.route._cache.clear()  # which rows one call can serve may have changed
    return made


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter (or all of them) off. After the last one the model is the very model that came in."""
    weave = weave_of(model)
    if weave.merged is not None:
        raise AdapterError(f"{weave.merged!r} is merged into the weights; unmerge before detaching")
    for each in [*records(model)] if name is None else [_known(model, name)]:
        record = records(model).pop(each)
        for address in record.adapters:
            seat = weave.seats[address]
            del seat.adapters[each]
            seat.module.adapters._modules.pop(each, None)  # type: ignore[union-attr]
        if "adapters" in model._modules:
            model.adapters._modules.pop(each, None)  # type: ignore[union-attr]
        if each in names(weave.route):
            weave.route = None
    _forget(weave)
    leave_sides(weave.seats)
    for module in {id(s.module): s.module for s in weave.seats.values()}.values():
        seats: dict[str, Seat] = module.__dict__["seats"]
        if not any(s.used() for s in seats.values()):
            for seat in seats.values():
                weave.seats.pop(seat.site.address, None)
                for follower in seat.followers:
                    unswap(follower.module)
            unswap(module)
    weave.unproved &= weave.seats.keys()
    leave(weave)
    if not records(model):
        _release(model)


def use(model: nn.Module, route: Any) -> None:
    """Choose what the next calls use: a name, None (the base, to the bit), {name: weight}, or a list, one per row."""
    weave = weave_of(model)
    new = as_route(route)
    for name in names(new):
        _known(model, name)
    if weave.merged is not None and new is not None:
        raise AdapterError(f"{weave.merged!r} is merged into the weights; unmerge before using {route!r}")
    if weave.entry is not None:
        check_blend(new, [weave.entry, *weave.entry.attentions])
    weave.route = new


@contextmanager
def using(model: nn.Module, route: Any) -> Iterator[nn.Module]:
    """Use a route inside a `with`; what was in use before comes back, also after an error."""
    weave = weave_of(model)
    before = weave.route
    use(model, route)
    try:
        yield model
    finally:
        if weave.merged is not None or not names(before) <= records(model).keys():
            before = None  # it was folded into the weights or taken off meanwhile
        weave.route = before


def parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The trainable tensors of one adapter, or of all: what an optimiser is given."""
    chosen = [_known(model, name)] if name is not None else [*records(model)]
    found = {}
    for each in chosen:
        record = records(model)[each]
        for holder in (*record.adapters.values(), *record.shared.values()):
            found.update({id(p): p for p in holder.parameters()})
    return [*found.values()]


@torch.no_grad()
def merge(model: nn.Module, route: Any, *, keep: bool = True) -> dict[str, float]:
    """Fold a route into the weights. Returns, per site, the largest error that writing the weight made.

    keep: remember the very bits that are overwritten, for `unmerge`; without it the fold is for good and every adapter
    is taken off. Raises AdapterError, before any weight is touched, for a method that is not linear in its input.
    """
    weave = weave_of(model)
    if weave.merged is not None:
        raise AdapterError(f"{weave.merged!r} is merged already; unmerge it first")
    new, wanted = as_route(route), foldable(model, route)
    if not wanted:
        raise AdapterError(f"{route!r} is the base as it is: there is nothing to merge; name an adapter or a blend")
    errors = {}
    saved: dict[str, Any] = {}
    modules = dict(walk(model))
    try:
        for seat in wanted:
            weave.untied.extend(filter(None, [untie(model, seat, modules)]))
            value = seat.value(new)
            saved[seat.site.address] = seat.snapshot()
            seat.write(value)
            errors[seat.site.address] = (seat.weight().float() - value.dense(seat.weight()).float()).abs().max().item()
    except BaseException:
        _restore(weave, saved)
        raise
    weave.merged, weave.saved, weave.route = new, saved, None
    if not keep:
        trainable = model.__dict__["was_trainable"]
        trainable.extend([u.seat.stored() for u in weave.untied if any(u.original is p for p in trainable)])
        weave.merged, weave.saved, weave.untied = None, {}, []
        detach(model)
    return errors


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Put back the very bits that `merge` overwrote, and use the route that was merged."""
    weave = weave_of(model)
    if weave.merged is None:
        raise AdapterError("nothing is merged into this model")
    _restore(weave, weave.saved)
    weave.route, weave.merged, weave.saved = weave.merged, None, {}
    _forget(weave)


def foldable(model: nn.Module, route: Any) -> list[Seat]:
    """The seats whose weights a merge of this route changes; AdapterError when one of them cannot hold the result."""
    weave, new = weave_of(model), as_route(route)
    for name in names(new):
        _known(model, name)
    wanted = [s for s in weave.seats.values() if names(new) & s.adapters.keys()]
    for seat in wanted:
        _mergeable(seat, new)
    return wanted


def _restore(weave: Weave, saved: Mapping[str, Any]) -> None:
    for address, bits in saved.items():
        weave.seats[address].restore(bits)
    for each in reversed(weave.untied):
        retie(each)
    weave.untied = []


def _mergeable(seat: Seat, route: Route) -> None:
    if isinstance(route, Rows):
        raise AdapterError("a route with one adapter per row has no single weight to merge; merge one name or a blend")
    try:
        seat.check_writable(seat.value(route))
    except NotLinear as error:
        raise AdapterError(
            f"{seat.site.address}: {_methods_at(seat, route)} {error}, so no weight can express it; serve it unmerged"
        ) from error
    except TypeError as error:
        raise AdapterError(f"{seat.site.address}: {_methods_at(seat, route)} cannot be merged: {error}") from error


def _methods_at(seat: Seat, route: Route) -> str:
    return ", ".join(sorted({seat.adapters[n].method.name for n in names(route) & seat.adapters.keys()}))


def _known(model: nn.Module, name: str) -> str:
    if name not in records(model):
        known = records(model)
        raise AdapterError(f"this model has no adapter {name!r}; {nearest(name, known) if known else 'it has none'}")
    return name


def _check_name(model: nn.Module, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
        raise AdapterError(f"adapter name {name!r}: use letters, digits, '_' and '-'")
    if name in records(model):
        raise AdapterError(f"this model already has an adapter {name!r}; detach it first or choose another name")


def _check_free(model: nn.Module, chosen: Iterable[nn.Module]) -> None:
    """AdapterError when a module has something of its own under a name that its adapters would take."""
    if not isinstance(model.__dict__.get("weave"), Weave):
        _refuse_taken(model, _ROOT_NAMES & model.__dict__.keys())
    for module in (model, *chosen):
        kept = module.__dict__.get("adapters", module._modules.get("adapters"))
        _refuse_taken(module, {"adapters"} if kept is not None and not isinstance(kept, Container) else set())
        if "weave" not in module.__dict__ and not isinstance(module, Woven):
            _refuse_taken(module, {"seat", "seats"} & module.__dict__.keys())


def _refuse_taken(module: nn.Module, taken: Collection[str]) -> None:
    if taken:
        raise AdapterError(
            f"{base_class(module).__name__} has an attribute {min(taken)!r} of its own, where Weft keeps what belongs "
            "to its adapters: rename it before attaching"
        )


def _adopt(model: nn.Module) -> None:
    """Give the root its state and freeze the base, remembering what was trainable."""
    model.__dict__["weave"] = Weave()
    model.__dict__["records"] = {}
    model.__dict__["was_trainable"] = [p for p in model.parameters() if p.requires_grad]
    for p in model.__dict__["was_trainable"]:
        p.requires_grad_(False)
    if "forward" in model.__dict__:  # a wrapper on the instance (device placement hooks) goes inside the checks
        model.__dict__["inner_forward"] = model.__dict__.pop("forward")
    mixin = WovenGenerator if hasattr(model, "_expand_inputs_for_generation") else WovenRoot
    model.__class__ = woven_class(base_class(model), mixin, ())


def _release(model: nn.Module) -> None:
    for p in model.__dict__.pop("was_trainable"):
        p.requires_grad_(True)
    for key in ("weave", "records", "fingerprint"):
        model.__dict__.pop(key, None)
    if "inner_forward" in model.__dict__:
        model.__dict__["forward"] = model.__dict__.pop("inner_forward")
    model._modules.pop("adapters", None)
    model.__class__ = base_class(model)


def _seat(module: nn.Module, planned: PlannedSite, weave: Weave) -> Seat:
    """The module's seat for this site, made (and the class swapped) when it is the first."""
    address = planned.site.address
    if address in weave.seats:
        return weave.seats[address]
    seat = planned.offer.seat(module, planned.site, weave, planned.offer.param)
    seats = module.__dict__.setdefault("seats", {})
    seats[planned.offer.param] = seat
    if len(seats) == 1:
        module.__dict__["seat"] = seat
    shadowed: tuple[str, ...] = ()
    if issubclass(planned.offer.mixin, WovenWeight):
        owned = [p for s in seats.values() for p in (s.param, s.bias_param)]
        shadowed = tuple(sorted({p for p in owned if p in module._parameters}))
    swap(module, planned.offer.mixin, shadowed)
    weave.seats[address] = seat
    return seat


def _register(seat: Seat, name: str, adapter: Adapter) -> None:
    """Add an adapter at a seat; several bare parameters of one module each get a level of their own."""
    seat.adapters[name] = adapter
    container = _container(seat.module, name) if seat.site.address.endswith("." + seat.param) else None
    if container is None:
        _holder(seat.module)._modules[name] = adapter
    else:
        container._modules[seat.param] = adapter
    seat.weave.unproved.add(seat.site.address)
    seat.weave.reads_text |= adapter.method.selects_tokens()


def _holder(module: nn.Module) -> nn.Module:
    if "adapters" not in module._modules:
        module._modules["adapters"] = Container()
    return module._modules["adapters"]  # type: ignore[return-value]


def _container(module: nn.Module, name: str) -> nn.Module:
    return _holder(module)._modules.setdefault(name, Container())  # type: ignore[return-value]


def _forget(weave: Weave) -> None:
    """Drop everything that was kept for inference."""
    if isinstance(weave.route, Rows):
        weave.route._cache.clear()
    for seat in weave.seats.values():
        for adapter in seat.adapters.values():
            adapter.forget()
