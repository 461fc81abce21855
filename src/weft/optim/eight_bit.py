"""Optimisers of bitsandbytes: states in 8 bits, or in pages that move to the CPU's memory; on CPU and GPU alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from weft.core import option
from weft.errors import missing_extra
from weft.optim.choice import Choice, Groups, Setting

__all__: list[str] = []

_BLOCK = 256  # values that share a scale
_MAP_BYTES = 4 * 256  # the code book, held once for each state


@dataclass(frozen=True)
class _EightBit(Choice):
    """Dettmers et al. 2021, arXiv 2110.02861: states in blocks of 256 values with a scale of their own."""

    paper, source, per_tensor = "2110.02861", "bitsandbytes", True
    keeps: ClassVar[int] = 2
    maps: ClassVar[int] = 2
    kind: ClassVar[str]
    min_8bit_size: int = option(4096, help="smaller tensors keep their states in 32 bits", minimum=1)

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        betas = {"betas": setting.betas} if self.takes_betas else {}
        return _class(self.kind, groups)(groups, lr=setting.rate, min_8bit_size=self.min_8bit_size, **betas)

    def state_bytes(self, groups: Groups, setting: Setting) -> int:
        sizes = [p.numel() for group in groups for p in group["params"]]
        large = [n for n in sizes if n >= self.min_8bit_size]
        each = sum(n + 4 * -(-n // _BLOCK) for n in large) + 4 * (sum(sizes) - sum(large))
        return self.keeps * each + self.maps * _MAP_BYTES * bool(large)


@dataclass(frozen=True)
class AdamW8bit(_EightBit):
    """AdamW with both averages in 8 bits."""

    name, kind = "adamw-8bit", "AdamW8bit"
    what = "AdamW with both averages in 8 bits"


@dataclass(frozen=True)
class PagedAdamW8bit(_EightBit):
    """AdamW in 8 bits, whose states leave the GPU when its memory is short."""

    name, kind = "adamw-8bit-paged", "PagedAdamW8bit"
    what = "AdamW in 8 bits; on a GPU its states move to the CPU's memory when space is short"


@dataclass(frozen=True)
class Lion8bit(_EightBit):
    """Lion with its average in 8 bits."""

    name, kind, keeps, maps = "lion-8bit", "Lion8bit", 1, 1
    what = "Lion with its average in 8 bits"


@dataclass(frozen=True)
class RMSprop8bit(_EightBit):
    """RMSprop with its average in 8 bits."""

    name, kind, keeps, maps, takes_betas = "rmsprop-8bit", "RMSprop8bit", 1, 1, False
    what = "RMSprop with its average in 8 bits"


@dataclass(frozen=True)
class PagedAdamW(Choice):
    """AdamW in 32 bits, whose states leave the GPU when its memory is short."""

    name, source, paper, per_tensor = "adamw-paged", "bitsandbytes", "2305.14314", True
    what = "AdamW in 32 bits; on a GPU its states move to the CPU's memory when space is short"

    def make(self, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        return _class("PagedAdamW", groups)(groups, lr=setting.rate, betas=setting.betas)

    def state_bytes(self, groups: Groups, setting: Setting) -> int:
        return 8 * sum(p.numel() for group in groups for p in group["params"])


def _class(kind: str, groups: Groups) -> Any:
    """A class of the package; on a CPU, whose memory is where pages would go, the one without pages."""
    try:
        import bitsandbytes.optim
    except ImportError:
        raise missing_extra("quant", needs="bitsandbytes") from None
    on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])
    return getattr(bitsandbytes.optim, kind.removeprefix("Paged") if on_cpu else kind)
