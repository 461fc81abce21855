"""A seat: one place in a module where adapters sit, and the class swap that gives a module its seats."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weft.core.adapter import Adapter
from weft.core.affine import Affine, StartOp, WeightOp
from weft.core.given import Given, known
from weft.core.op import DataOp, Op
from weft.core.positions import Positions
from weft.core.route import Route, Rows, apply, merged
from weft.core.site import Site


@dataclass(eq=False)
class Weave:
    """What a whole model shares: the route in use, its seats, and what was folded into the weights.

    The route is the only notion of "active". unproved: addresses adapted since the last forward, whose modules have
    not yet been seen to be called.
    """

    route: Route = None
    seats: dict[str, Seat] = field(default_factory=dict)
    merged: Route = None
    saved: dict[str, Any] = field(default_factory=dict)
    expand: int = 1
    untied: list[Any] = field(default_factory=list)
    entry: Any = None  # the seat of the model's input, where there is one
    given: dict[str, Given] = field(default_factory=dict)  # for the rows of the next batches
    cases: Any = None  # which rows ask for the same virtual tokens, as last found out
    unproved: set[str] = field(default_factory=set)
    call: Any = None  # what the model was last called with, where a block is adapted
    prompts: Any = None  # those of a generation that runs
    has_blocks: bool = False
    causal: bool = False  # whether tokens of the model see earlier ones only
    text: Any = None  # what the model last read, where an adapter looks for tokens in it
    reads_text: bool = False
    surveyors: set[str] = field(default_factory=set)  # adapters that want the base to run first
    surveyed: Any = None  # the last hidden states of that pass, [B, T, C]


class Seat(ABC):
    """How one place of a module is read: its site, its op on data, its weight. Subclasses: one per kind.

    param, bias_param: the parameters that hold its weight and, if there is one, its bias.
    """

    kind: ClassVar[str]
    has_weight: ClassVar[bool] = True

    def __init__(self, module: nn.Module, site: Site, weave: Weave, param: str = "weight"):
        self.module, self.site, self.weave, self.param = module, site, weave, param
        self.bias_param = param.replace("weight", "bias") if "weight" in param else f"{param}_bias"
        self.base = base_class(module)
        own = module.__dict__
        self.inner_forward: Callable[..., Any] | None = own.get("forward") or own.get("inner_forward")
        self.adapters: dict[str, Adapter] = {}
        self.held: list[Affine] | None = None  # the adapted value, while a forward that reads it runs
        self.followers: list[Any] = []  # the seats of modules that share this weight and see it adapted
        self.op: Op = self.make_op()

    @classmethod
    @abstractmethod
    def shape(cls, module: nn.Module, param: str) -> dict[str, Any]:
        """Shape fields of the Site: out_features, in_features, and kernel_size, groups, experts where they apply."""

    def make_op(self) -> Op:
        """The op on data for this kind."""
        return DataOp(self.site, self)

    def start(self, statistics: Mapping[str, Tensor] | None = None) -> StartOp:
        """What a method's `init` is given here."""
        return StartOp(self.site, self.weight, self.bias, statistics)

    def used(self) -> bool:
        """Whether the module must stay swapped."""
        return bool(self.adapters)

    def call(self, x: Tensor) -> Tensor:
        """The module's own forward."""
        if self.inner_forward is not None:  # a wrapper that somebody set on the instance (device placement hooks)
            return self.inner_forward(x)
        return self.base.forward(self.module, x)

    def stored(self) -> Tensor:
        """The parameter itself, whatever property shadows it."""
        return self.module._parameters[self.param]  # type: ignore[return-value]

    def oriented(self, weight: Tensor) -> Tensor:
        """Between the stored orientation and the one that methods see; its own inverse."""
        return weight

    def weight(self) -> Tensor:
        """[O, I, *kernel]: the weight in the orientation that methods see."""
        return self.oriented(self.stored())

    def bias(self) -> Tensor | None:
        """[O] or None."""
        return self.module._parameters.get(self.bias_param)

    def training(self) -> bool:
        return self.module.training

    def linear(self) -> bool:
        """Whether the module is a frozen x W^T + bias and nothing else."""
        return False

    def held_in(self) -> Mapping[str, Tensor | None]:
        return self.module._parameters

    def given(self, name: str, count: int) -> Tensor:
        return known(self.weave.given, name, count, self.site.address).expanded(self.weave.expand)

    def num_seen(self) -> int:
        return 0 if self.weave.text is None else self.weave.text.seen

    def invoked(self, x: Tensor, tokens: tuple[int, ...]) -> Tensor:
        text = self.weave.text
        if text is None:
            raise ValueError(
                f"{self.site.address} was called alone, and its adapter looks for {list(tokens)} in the text that the "
                "model reads: call the model that the adapter is attached to"
            )
        found: Tensor = text.at(x, tokens, self.site.address)
        return found

    def hidden(self) -> list[Tensor]:
        if self.weave.surveyed is None:
            raise ValueError(
                f"{self.site.address} was called alone, and its adapter reads what the whole base makes of a text "
                "first: call the model that the adapter is attached to"
            )
        return [self.weave.surveyed]

    def positions(self, x: Tensor) -> Positions:
        raise TypeError(f"{self.site.address} is of kind {self.site.kind}: only tokens at a block have positions")

    def run(self, x: Any) -> Any:
        """The module's map on x under the route in use."""
        route = self.weave.route
        if isinstance(route, str):
            adapter = self.adapters.get(route)
            return self.call(x) if adapter is None else adapter.run(x, self.op, keep=True)
        return apply(route, x, self.op, self.adapters, self.weave.expand)

    def value(self, route: Route) -> Affine:
        """The affine map that a route makes of this seat's weight (the merge reading)."""
        op = WeightOp(self.site, self.weight(), self.bias())
        return merged(route, op, self.adapters)

    def check_writable(self, value: Affine) -> None:
        """Raise TypeError, before anything is touched, when a merged map cannot be written into this module."""
        if value.bias is not None and self.bias() is None:
            raise TypeError(
                "the module has no bias to fold this adapter's shift into; "
                "serve it unmerged, or give the module a bias first"
            )

    def write(self, value: Affine) -> None:
        """Replace weight and bias in place by a merged map."""
        self.write_weight(value.dense(self.weight()))
        bias = self.bias()
        if bias is not None and value.bias is not None:
            bias.data.copy_(value.bias)

    def write_weight(self, weight: Tensor) -> None:
        """Replace the weight, given in the orientation that methods see."""
        self.stored().data.copy_(self.oriented(weight))

    def snapshot(self) -> Any:
        """The very bits that `write` overwrites."""
        bias = self.bias()
        return self.stored().detach().clone(), None if bias is None else bias.detach().clone()

    def restore(self, saved: Any) -> None:
        """Put a snapshot back, bit for bit."""
        weight, bias = saved
        self.stored().data.copy_(weight)
        if bias is not None:
            self.bias().data.copy_(bias)  # type: ignore[union-attr]


class Woven:
    """Mixin of every module class that has been swapped; `seats` maps a parameter name to its seat."""

    base_class: ClassVar[type[nn.Module]]
    through_root: ClassVar[bool] = True  # whether a model that is itself the site runs this mixin's forward
    seats: dict[str, Seat]
    adapters: Container

    def __reduce_ex__(self, protocol: Any) -> Any:  # the swapped class has no importable name: rebuild it
        mixin, base = type(self).__bases__
        return _rebuild, (base, mixin, type(self).properties), self.__getstate__()  # type: ignore[attr-defined]


class WovenForward(Woven):
    """A module whose forward is one map of its first argument."""

    seat: Seat

    def forward(self, input: Tensor) -> Tensor:
        seat = self.seat
        weave = seat.weave
        if weave.unproved and not torch.compiler.is_compiling():
            prove(seat)
        if weave.route is None:
            return seat.call(input)
        return seat.run(input)


class WovenWeight(Woven):
    """A module that reads its adapted parameters itself: it finds them adapted (the merge reading, materialised)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = next(iter(self.seats.values()))
        route = first.weave.route
        forward = partial(read_once, self, first.inner_forward or self.base_class.forward.__get__(self))
        if isinstance(route, Rows):
            return split_rows(self, forward, route, args, kwargs)
        return forward(*args, **kwargs)


class Container(nn.Module):
    """Holds a module's adapters by name. Children are set directly, so a name may be any that a path allows."""


def prove(seat: Seat) -> None:
    """Note that this seat's module was really called."""
    if not torch.compiler.is_compiling():
        seat.weave.unproved.discard(seat.site.address)


def read_once(module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a forward that reads adapted parameters, each computed once however often it is read."""
    seats = [*module.seats.values()]
    before = [s.held for s in seats]
    for seat in seats:
        seat.held = []
    try:
        return forward(*args, **kwargs)
    finally:
        for seat, held in zip(seats, before, strict=True):
            seat.held = held


def split_rows(
    module: Any, forward: Callable[..., Any], rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the module once per distinct route on that route's rows, for modules that read one weight for all rows."""
    if isinstance(module, nn.MultiheadAttention):  # its mask has no row per batch entry, so arguments need their names
        bound = inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs)
        args, kwargs = (), {k: v for k, v in bound.arguments.items() if k != "self"}
    weave = next(iter(module.seats.values())).weave
    x = args[0] if args else next(iter(kwargs.values()))
    dim = 1 if x.ndim == 3 and getattr(module, "batch_first", True) is False else 0
    ids = torch.tensor(rows.for_leading(x.shape[dim], exact=x.ndim != 2, expand=weave.expand), device=x.device)
    result, order = [], []
    for i, route in enumerate(rows.routes):
        where = (ids == i).nonzero().flatten()
        if not len(where):
            continue
        here = [_take(module, "", a, where, dim, len(ids)) for a in args]
        there = {k: _take(module, k, a, where, dim, len(ids)) for k, a in kwargs.items()}
        weave.route = route
        try:
            result.append(forward(*here, **there))
        finally:
            weave.route = rows
        order.append(where)
    back = torch.cat(order).argsort()
    if not isinstance(result[0], tuple):
        return torch.cat(result, dim).index_select(dim, back)
    first = torch.cat([r[0] for r in result], dim).index_select(dim, back)
    rest = zip(*[r[1:] for r in result], strict=True)
    return (first, *[None if t[0] is None else torch.cat(t).index_select(0, back) for t in rest])


def _take(module: nn.Module, name: str, a: Any, where: Tensor, dim: int, rows: int) -> Any:
    """The chosen rows of an argument that has one entry per row; anything else as it is."""
    if not isinstance(a, Tensor) or not a.ndim:
        return a
    if isinstance(module, nn.MultiheadAttention) and name == "attn_mask":
        if a.ndim == 2:  # [T, T], the same for every row, also when there happen to be T rows
            return a
        return a.unflatten(0, (rows, -1)).index_select(0, where).flatten(0, 1)  # [B heads, T, T]
    along = dim if a.ndim == 3 else 0
    return a.index_select(along, where) if a.shape[along] == rows else a


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before any swap."""
    return getattr(type(module), "base_class", None) or type(module)


def adapted_value(param: str) -> property:
    """A property that shadows a parameter: the stored tensor, adapted under the route in use."""

    def get(self: Any) -> Any:
        stored = self._parameters[param]
        seat = next((s for s in self.seats.values() if param in (s.param, s.bias_param)), None)
        if stored is None or seat is None or seat.weave.route is None or not seat.adapters:
            return stored
        if isinstance(seat.weave.route, Rows):
            raise ValueError(
                f"{seat.site.address} is read as one weight by its neighbour, so rows of one batch cannot use "
                "different adapters there; call the model once per adapter, or adapt other modules"
            )
        prove(seat)
        value = seat.held[0] if seat.held else seat.value(seat.weave.route)
        if seat.held is not None:
            seat.held[:] = [value]
        if param == seat.param:
            return seat.oriented(value.dense(seat.weight())).to(stored.dtype)
        return stored if value.bias is None else value.bias.to(stored.dtype)

    return property(get)


def _woven_class(base: type[nn.Module], mixin: type, properties: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of `base` under the same name, whose forward and named parameters are read with adapters."""
    body: dict[str, Any] = {"__module__": base.__module__, "base_class": base, "properties": properties}
    body.update({p: adapted_value(p) for p in properties})
    if issubclass(base, nn.Sequential):  # it calls all its children in turn, and adapters are none of its steps
        body["__iter__"] = lambda self: iter([m for m in self._modules.values() if not isinstance(m, Container)])
        body["__len__"] = lambda self: sum(1 for _ in self)
    body["forward"] = _signed(mixin.forward, base.forward)  # type: ignore[attr-defined]
    return type(base.__name__, (mixin, base), body)


# One class for the same three, always; annotated: to mypy a class has no hash.
woven_class: Callable[[type, type, tuple[str, ...]], type[nn.Module]] = cache(_woven_class)


def _signed(forward: Any, base_forward: Any) -> Any:
    """A copy of a mixin's forward with the arguments of the base's: trainers and `generate` look at their names."""
    copy = FunctionType(forward.__code__, forward.__globals__, "forward", forward.__defaults__, forward.__closure__)
    copy.__signature__ = inspect.signature(base_forward)  # type: ignore[attr-defined]
    return copy


def _rebuild(base: type[nn.Module], mixin: type, properties: tuple[str, ...]) -> nn.Module:
    cls = woven_class(base, mixin, properties)
    return cls.__new__(cls)


def swap(module: nn.Module, mixin: type, properties: tuple[str, ...] = ()) -> None:
    """Give a module the class that reads its seats; `unswap` is the inverse. A root calls `inner_mixin` itself."""
    base = base_class(module)
    if "weave" in module.__dict__:
        if mixin.through_root:  # type: ignore[attr-defined]
            module.__dict__["inner_mixin"] = mixin
            module.__class__ = woven_class(base, type(module).__bases__[0], properties)
        return
    module.__dict__.pop("forward", None)  # kept by the seat as `inner_forward`
    module.__class__ = woven_class(base, mixin, properties)


def unswap(module: nn.Module) -> None:
    """Leave the module that came in."""
    seat = next(iter(module.__dict__["seats"].values()))
    for key in ("seats", "seat", "inner_mixin"):
        module.__dict__.pop(key, None)
    if "weave" in module.__dict__:
        module.__class__ = woven_class(base_class(module), type(module).__bases__[0], ())
        return
    module._modules.pop("adapters", None)
    if seat.inner_forward is not None:
        module.__dict__["forward"] = seat.inner_forward
    module.__class__ = base_class(module)
