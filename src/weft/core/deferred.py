"""Values that verbs give before they are computed."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["Deferred", "value"]


class Deferred:
    """A value that is not computed yet. Any use but a verb of the op that made it computes it, once."""

    _known: Tensor | None = None

    def tensor(self) -> Tensor:
        """The value."""
        if self._known is None:
            self._known = self._compute()
        return self._known

    def _compute(self) -> Tensor:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*map(value, args), **{k: value(v) for k, v in (kwargs or {}).items()})


def _forced(function: Callable[..., Any], *, swapped: bool = False) -> Callable[..., Any]:
    if swapped:
        return lambda self, other: function(value(other), self.tensor())
    return lambda self, *others: function(self.tensor(), *map(value, others))


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow"):
    setattr(Deferred, f"__{_name}__", _forced(getattr(operator, _name)))
    setattr(Deferred, f"__r{_name}__", _forced(getattr(operator, _name), swapped=True))
for _name in ("neg", "getitem"):
    setattr(Deferred, f"__{_name}__", _forced(getattr(operator, _name)))


def value(v: Any) -> Any:
    """The tensor of a deferred value; anything else as it is."""
    return v.tensor() if isinstance(v, Deferred) else v
