"""The protocol of a method: hyper-parameters in a frozen dataclass, and functions over the verbs of `Op`."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from weft.core.affine import StartOp
from weft.core.evolve import Part, Progress
from weft.core.op import Op
from weft.core.site import Site

Tensors = Mapping[str, Tensor]

LINEAR = frozenset({"linear", "conv", "embedding", "experts"})
"""Kinds of site that hold one linear map."""


@dataclass(frozen=True)
class Frozen:
    """Marks a tensor of `init` or `shared` that is saved with the adapter and never trained."""

    tensor: Tensor


def option(
    default: Any,
    *,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Any:
    """A hyper-parameter with its meaning and its bounds; types and choices come from the annotation."""
    return field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum, "above": above})


@dataclass(frozen=True)
class Method:
    """One way to adapt a map. Subclass it with a `name`: that registers it, and every reading works.

    name: how recipes, folders and `weft.methods()` call it.
    paper: the arXiv id (or DOI) of the paper that it follows.
    kinds: the kinds of site it can adapt.
    bias_outside: True when `op(x)` must not contain the bias; it is then added after `forward` (DoRA).
    default_targets: what is adapted when the caller does not say.
    pairs: names (A, B) of the factors of a low-rank update B A that may train, for optimisers that know such pairs.
    copies: names of tensors that start as the very values that they take the place of.
    random: True when `coefficients` draw random numbers in training (`op.chance`): they are then kept for the backward.
    changes_start: True when a fresh adapter cannot leave the map as it is, since it is there to compute less of it.
    conditions: names of what its body reads of every row of a batch (`op.given`).
    alone: True when its body can be read for one adapter at a time only (side networks): it is never stacked.
    aside: names of trained tensors that only losses of its own read (`op.penalise`): they move no output.
    surveys: True when the base runs first, without any adapter, and its last hidden states are there at every site
        (`op.hidden`).
    looks_for: the option with the tokens that its body looks for in a text (`op.invoked`), if it has one.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    kinds: ClassVar[frozenset[str]] = LINEAR
    bias_outside: ClassVar[bool] = False
    default_targets: ClassVar[str] = "all-linear"
    pairs: ClassVar[tuple[tuple[str, str], ...]] = ()
    copies: ClassVar[tuple[str, ...]] = ()
    random: ClassVar[bool] = False
    changes_start: ClassVar[bool] = False
    conditions: ClassVar[tuple[str, ...]] = ()
    alone: ClassVar[bool] = False
    aside: ClassVar[tuple[str, ...]] = ()
    surveys: ClassVar[bool] = False
    looks_for: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            _register(cls)

    def __post_init__(self) -> None:
        check_options(self)

    def check(self, site: Site) -> None:
        """Raise ValueError when this site's shape cannot be adapted with these hyper-parameters."""

    def adapts(self, index: int, count: int) -> bool:
        """Whether it takes part at the index-th of `count` matched sites (methods for the last layers only)."""
        return True

    def needs(self) -> frozenset[str]:
        """Statistics of calibration data that `init` asks its op for: "covariance", "gradient", "curvature"."""
        return frozenset()

    def deal(self, sites: Sequence[Site], ops: Sequence[StartOp]) -> Sequence[Self | None]:
        """What each site gets once calibration data has been read: options that sites compete for; None: nothing."""
        return [self] * len(sites)

    def shared(self, sites: Sequence[Site]) -> Mapping[str, Tensor | Frozen]:
        """Tensors that all sites of one adapter use together; each site sees them beside its own."""
        return {}

    def shared_start(self, sites: Sequence[Site], ops: Sequence[StartOp]) -> Mapping[str, Tensor | Frozen]:
        """What `shared` is at the start, of the same names and shapes, for a method that makes it of the weights."""
        return self.shared(sites)

    def init(self, site: Site, op: StartOp) -> Mapping[str, Tensor | Frozen]:
        """Fresh tensors for one site; the adapted map must equal the frozen one."""
        raise NotImplementedError

    def coefficients(self, t: Tensors, op: Op) -> Tensors:
        """What `forward` uses, from the tensors: once per step in training, cached when nothing changes."""
        return t

    def forward(self, c: Tensors, x: Any, op: Op) -> Any:
        """The adapted map, in verbs."""
        raise NotImplementedError

    def penalty(self, t: Tensors, site: Site) -> Tensor | None:
        """What training minimises beside the loss of the data, from one site's tensors; once per step."""
        return None

    def evolve(self, parts: Sequence[Part], progress: Progress) -> None:
        """Change tensors between two steps: after the optimiser's step, with its gradients still there.

        All sites of the adapter come together, in the model's order, so that they can compete for a budget.
        """

    def selects_tokens(self) -> bool:
        """Whether its body asks which tokens of a text it may change (`op.invoked`)."""
        return bool(self.looks_for) and bool(getattr(self, self.looks_for))

    @property
    def reads_batch(self) -> bool:
        """Whether its body reads more of a batch than the input of its site."""
        return bool(self.conditions) or self.alone or self.selects_tokens()

    def shares(self) -> bool:
        """Whether there is anything that sites share."""
        return type(self).shared is not Method.shared

    def evolves(self) -> bool:
        """Whether `evolve` does anything."""
        return type(self).evolve is not Method.evolve

    def spec(self) -> dict[str, Any]:
        """Name and hyper-parameters, as they are written to disk."""
        return {"name": self.name, **dataclasses.asdict(self)}


_METHODS: dict[str, type[Method]] = {}


def _register(cls: type[Method]) -> None:
    other = _METHODS.get(cls.name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"method {cls.name!r} of {cls.__module__} is already registered by {other.__module__}; rename one"
        )
    _METHODS[cls.name] = cls


def registered() -> dict[str, type[Method]]:
    """Every method defined so far, by name. `weft.methods()` loads the built-in ones and plug-ins first."""
    return dict(sorted(_METHODS.items()))


hints: Callable[[type], dict[str, Any]] = cache(typing.get_type_hints)  # annotated: to mypy a class has no hash
"""The declared types of a method's options, resolved."""


def check_options(method: Any) -> None:
    """Prove the declared type, choices and bounds of every option; ValueError or TypeError says which one fails."""
    name = getattr(method, "name", type(method).__name__)
    for f in dataclasses.fields(method):
        value, where = getattr(method, f.name), f"{name}.{f.name}={getattr(method, f.name)!r}"
        expected = hints(type(method))[f.name]
        if not _fits(value, expected):
            raise TypeError(f"{where}: expected {_describe(expected)}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high, above = (f.metadata.get(key) for key in ("minimum", "maximum", "above"))
            if low is not None and value < low:
                raise ValueError(f"{where}: must be at least {low}")
            if above is not None and value <= above:
                raise ValueError(f"{where}: must be above {above}")
            if high is not None and value > high:
                raise ValueError(f"{where}: must be at most {high}")


def _fits(value: Any, expected: Any) -> bool:
    origin = typing.get_origin(expected)
    if expected is Any:
        return True
    if origin is Literal:
        return value in typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, e) for e in typing.get_args(expected))
    if origin is tuple:
        inner = typing.get_args(expected)[0]
        return isinstance(value, tuple) and all(_fits(v, inner) for v in value)
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if expected is type(None) else isinstance(value, expected)


def _describe(expected: Any) -> str:
    if typing.get_origin(expected) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(expected)))
    return getattr(expected, "__name__", str(expected)) if typing.get_origin(expected) is None else str(expected)
