"""The protocol of an optimiser's name: options in a frozen dataclass, and a function that makes the optimiser."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weft.core.method import check_options, hints
from weft.errors import WeftError, nearest

__all__ = ["Choice", "Groups", "Pair", "Setting", "Trained", "choices", "provide", "resolve", "with_options"]

Groups = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Pair:
    """The factors of a low-rank update up @ down, of which one may be frozen: down [R, I] and up [O, R]."""

    down: Tensor
    up: Tensor
    groups: int = 1
    experts: bool = False

    def of_down(self, t: Tensor) -> Tensor:
        """A tensor of the first factor's shape as matrices [N, R, I], N groups or experts."""
        return t.flatten(2) if self.experts else t.reshape(self.groups, t.shape[0] // self.groups, -1)

    def of_up(self, t: Tensor) -> Tensor:
        """A tensor of the second factor's shape as matrices [N, O, R]."""
        if self.experts:
            return t
        return t.reshape(self.groups, -1, t.shape[-1])

    def as_up(self, t: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `of_up`."""
        return t.reshape(shape)


@dataclass(frozen=True, eq=False)
class Trained:
    """One trained tensor and what it is: its name, the layer that holds it, and its role over all layers."""

    name: str
    parameter: nn.Parameter
    layer: int | None = None
    component: str = ""


@dataclass(frozen=True, eq=False)
class Setting:
    """What every optimiser is given beside its own options."""

    trained: Sequence[Trained]
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0
    pairs: Sequence[Pair] = ()
    steps_per_epoch: int = 1


@dataclass(frozen=True)
class Choice:
    """One optimiser by name. Subclass it with a `name`: that registers it.

    what: one line about it. paper: the arXiv id that it follows. source: the package that keeps it.
    takes_betas: whether it reads the recipe's `train.betas`. decays: whether it knows weight decay.
    per_tensor: whether the update of a tensor needs that tensor and its gradient alone, in any order.
    forward_only: whether it needs no backward pass. schedule_free: whether it averages instead of a falling rate.
    """

    name: ClassVar[str]
    what: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    source: ClassVar[str] = "weft"
    takes_betas: ClassVar[bool] = True
    decays: ClassVar[bool] = True
    per_tensor: ClassVar[bool] = False
    forward_only: ClassVar[bool] = False
    schedule_free: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            provide(cls.name, lambda: cls)

    def __post_init__(self) -> None:
        check_options(self)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        """The optimiser over parameter groups that may each have `weight_decay`."""
        raise NotImplementedError

    def state_bytes(self, groups: Groups, setting: Setting) -> int | None:
        """What it keeps for these parameters, where that has a formula; None: found by a step on no real tensors."""
        return None


_KNOWN: dict[str, Callable[[], type[Choice]]] = {}


def provide(name: str, load: Callable[[], type[Choice]]) -> None:
    """Register an optimiser whose class is had from `load` when it is asked for. ValueError for a name twice."""
    if name in _KNOWN:
        raise ValueError(f"there are two optimisers named {name!r}; rename one")
    _KNOWN[name] = load


def choices() -> dict[str, Callable[[], type[Choice]]]:
    """Every optimiser by name, with what gives its class (MissingExtra where its package is not installed)."""
    return dict(sorted(_KNOWN.items()))


def resolve(spec: str | Mapping[str, Any], *, where: str = "train.optimizer") -> Choice:
    """The optimiser that a name, or a mapping of `name` and options, describes; WeftError says what is wrong."""
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in _KNOWN:
        raise WeftError(f"{where}: there is no optimiser {name!r}; {nearest(str(name), _KNOWN)}")
    cls = _KNOWN[name]()
    return with_options(cls, options, where=where)


def with_options(cls: Any, options: Mapping[str, Any], *, where: str) -> Any:
    """An instance of a dataclass of options; WeftError names the option that is unknown or out of bounds."""
    fields = [f.name for f in dataclasses.fields(cls)]
    for key in options:
        if key not in fields:
            known = nearest(key, fields) if fields else "it has no options"
            raise WeftError(f"{where}: {cls.name} has no option {key!r}; {known}")
    declared = hints(cls)

    def plain(key: str, value: Any) -> Any:
        """Lists as a file holds them are tuples where tuples are declared."""
        wants = any(typing.get_origin(h) is tuple for h in (declared[key], *typing.get_args(declared[key])))
        return tuple(value) if wants and isinstance(value, list) else value

    try:
        return cls(**{key: plain(key, value) for key, value in options.items()})
    except (TypeError, ValueError) as error:
        raise WeftError(f"{where}: {error}") from None
