"""What a merging rule is: a pure function from several tensors of one shape to one, with declared options."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.core.method import check_options
from weft.errors import WeftError

__all__ = ["Converted", "Given", "Rule", "RuleError", "each", "rules"]


class RuleError(WeftError, ValueError):
    """Tensors, weights or options that a rule cannot take."""


@dataclass(frozen=True)
class Given:
    """What comes with the tensors. weights, statistics: one for each; base: always there for a rule that needs it."""

    weights: tuple[float, ...]
    base: Any
    statistics: Any
    generator: torch.Generator | None


@dataclass(frozen=True)
class Converted(Sequence[Tensor]):
    """Tensors in another number format, each made when it is asked for and not kept."""

    tensors: Sequence[Tensor]
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Converted(self.tensors[index], self.dtype)
        return self.tensors[index].to(self.dtype)


@dataclass(frozen=True)
class Rule:
    """One way to make a tensor of several. Subclass it with a `name`: that registers it.

    Its options are dataclass fields; one that may differ from tensor to tensor is a number, or a tuple with one for
    each. `combine` sees floating tensors of one shape and dtype, and does not change them.

    paper: the arXiv id, where there is one. needs_base: whether it merges differences to a base.
    fewest, most: how many tensors it takes, the base not counted. weighted: whether it reads the weights.
    random: whether it draws from the generator. by_entry: whether an entry of the result is made of that entry of the
        tensors alone, so that parts of tensors can be merged one after another.
    once: whether `combine` goes through the tensors once, in order, so that only one has to be in float32 at a time.
    needs: the statistic of each tensor's data that it reads: "fisher" (mean squared gradient, of the tensor's shape) or
        "covariance" (mean of x x^T of a map's inputs, [I, I]).
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    needs_base: ClassVar[bool] = False
    fewest: ClassVar[int] = 1
    most: ClassVar[int | None] = None
    weighted: ClassVar[bool] = True
    random: ClassVar[bool] = False
    by_entry: ClassVar[bool] = False
    once: ClassVar[bool] = False
    needs: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            other = _RULES.get(cls.name)
            if other is not None and other.__module__ != cls.__module__:
                raise ValueError(f"rule {cls.name!r} of {cls.__module__} is already registered by {other.__module__}")
            _RULES[cls.name] = cls

    def __post_init__(self) -> None:
        check_options(self)

    @torch.no_grad()
    def __call__(
        self,
        tensors: Sequence[Tensor],
        *,
        weights: Sequence[float] | None = None,
        base: Tensor | None = None,
        statistics: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The merged tensor, in the dtype of the base or of the first one, without a graph; made in float32 or better.

        weights: one for each tensor, 1 by default. base: of the shape of the tensors; rules that need none ignore it
            unless they say otherwise. statistics: of each tensor's data, for rules that need them. generator: for rules
            that draw; the same one gives the same result.
        Raises RuleError for a number of tensors, weights or options that does not fit, and for shapes that differ.
        """
        self._check(tensors, weights, base, statistics)
        first = base if base is not None else tensors[0]
        if not first.is_floating_point():  # counters and positions: there is nothing to average
            return first
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        given = Given(
            (1.0,) * len(tensors) if weights is None else tuple(map(float, weights)),
            None if base is None else base.to(dtype),
            None if statistics is None else [s.to(dtype) for s in statistics],
            generator,
        )
        converted = Converted(tensors, dtype)
        return self.combine(converted if self.once else [*converted], given).to(first.dtype)

    def factors(self, weights: tuple[float, ...]) -> tuple[float, ...] | None:
        """What each tensor is multiplied by where the rule is such a sum and nothing else; None for all others."""
        return None

    def combine(self, tensors: Sequence[Tensor], given: Given) -> Tensor:
        """The rule itself."""
        raise NotImplementedError

    def _check(
        self,
        tensors: Sequence[Tensor],
        weights: Sequence[float] | None,
        base: Tensor | None,
        statistics: Sequence[Tensor] | None,
    ) -> None:
        count = len(tensors)
        if count < self.fewest or (self.most is not None and count > self.most):
            wanted = f"{self.fewest}" if self.most == self.fewest else f"{self.fewest} or more"
            raise RuleError(f"{self.name} takes {wanted} tensors beside the base, and {count} are given")
        if self.needs_base and base is None:
            raise RuleError(f"{self.name} merges differences to a base: give the base that these were tuned from")
        if self.needs and (statistics is None or len(statistics) != count):
            raise RuleError(f"{self.name} weighs tensors by their data: give the {self.needs} of each of the {count}")
        if weights is not None and len(weights) != count:
            raise RuleError(f"{self.name}: {len(weights)} weights for {count} tensors; give one for each")
        shapes = {tuple(t.shape) for t in (*tensors, *([] if base is None else [base]))}
        if len(shapes) > 1:
            raise RuleError(f"{self.name}: tensors of one shape are expected, not of {sorted(shapes)}")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple) and len(value) != count:
                raise RuleError(f"{self.name}.{f.name}: {len(value)} values for {count} tensors; give one for each")


def each(value: Any, count: int) -> tuple[Any, ...]:
    """An option as one value for each tensor."""
    return value if isinstance(value, tuple) else (value,) * count


_RULES: dict[str, type[Rule]] = {}


def rules() -> dict[str, type[Rule]]:
    """Every rule by name. `weft.combine` loads the built-in ones."""
    return dict(sorted(_RULES.items()))
