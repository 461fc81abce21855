"""What stands for a tensor in a small file: bytes, a few numbers that scale them, and how to read both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weft.errors import nearest

__all__ = ["Code", "code_class"]


@dataclass(frozen=True)
class Code(ABC):
    """A tensor in code. Subclass it with a `name`: that is what a file calls it.

    codes: uint8 [N]. scales: float32 [M]. options: whole numbers that say how the two are read.
    """

    name: ClassVar[str]
    codes: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    options: tuple[int, ...] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _CODES[cls.name] = cls

    @property
    def num_bytes(self) -> int:
        """Bytes of the codes and of what scales them."""
        return self.codes.numel() + 4 * self.scales.numel()

    @property
    def numel(self) -> int:
        """Entries of the tensor."""
        return torch.Size(self.shape).numel()

    @abstractmethod
    def tensor(self) -> Tensor:
        """What it stands for. ValueError where codes, scales and options do not fit each other."""

    def checked(self, *, num_codes: int, num_scales: int, num_options: int) -> None:
        """ValueError where there are not as many of each as the shape asks for."""
        found = {"bytes of codes": self.codes.numel(), "scales": self.scales.numel(), "options": len(self.options)}
        for (what, number), wanted in zip(found.items(), (num_codes, num_scales, num_options), strict=True):
            if number != wanted:
                raise ValueError(f"{number} {what} where a tensor of {self.shape} in {self.name} has {wanted}")


_CODES: dict[str, type[Code]] = {}


def code_class(name: str) -> type[Code]:
    """The code called `name`; ValueError names the nearest."""
    if name not in _CODES:
        raise ValueError(f"there is no code {name!r}; {nearest(name, _CODES)}")
    return _CODES[name]
