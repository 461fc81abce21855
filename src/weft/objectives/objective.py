"""What a loss is: a pure function of a model and a batch, found by its name."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from weft.errors import WeftError, nearest

if TYPE_CHECKING:
    import torch

    from weft.data.batch import Batch

__all__ = ["LossSum", "Objective", "get", "names"]

LossSum = tuple["torch.Tensor", int, dict[str, "torch.Tensor"]]

_registry: dict[str, type[Objective]] = {}


class Objective(ABC):
    """A loss. Sums, not means, come out, so that batches, accumulation and processes add up exactly."""

    name: ClassVar[str]  # as in a recipe

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if inspect.isabstract(cls):
            return
        if cls.name in _registry:
            other = _registry[cls.name]
            raise ValueError(f"two objectives are named '{cls.name}': {other.__qualname__} and {cls.__qualname__}")
        _registry[cls.name] = cls

    @staticmethod
    @abstractmethod
    def loss(model: Any, batch: Batch) -> LossSum:
        """The sum of the losses (with its graph), how many there are, and sums of metrics over the same count."""

    @classmethod
    def chunked(cls, model: Any, chunk: int | None) -> tuple[Callable[[Any, Batch], LossSum], str | None]:  # noqa: ARG003
        """The loss with the logits of `chunk` positions held at once (0: of all; None: of a number that is chosen).

        Also what is to be said where it was not asked for and cannot be had; asked for, that is a WeftError.
        """
        if chunk:
            raise WeftError(f"train.loss_chunk: the loss of {cls.name} holds no logits per token that could be cut")
        return cls.loss, None


def get(name: str) -> type[Objective]:
    """The objective of that name; a name that is not known is an error with the nearest that is."""
    if name not in _registry:
        raise WeftError(f"no objective is named '{name}'; {nearest(name, _registry)}")
    return _registry[name]


def names() -> tuple[str, ...]:
    """Every objective that is defined."""
    return tuple(sorted(_registry))
