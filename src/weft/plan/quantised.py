"""What stands for quantised layers in a forecast: the bytes that they store, and the dense weight while it is used."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from weft.kinds.packed import PackedLinear
from weft.quantise import quantise_model
from weft.quantise.schemes import GROUP_SIZE, SCHEMES

__all__ = ["StandIn", "quantise_fake"]

_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # codes, one byte of scale for 64 of them, and a scale for 256 scales
_INT8_BITS = 8.0
_GRID_STEPS = 1  # codes, zero points or scales: one of them is there beside the weight


class StandIn(PackedLinear):
    """So many bytes, from which a dense weight comes.

    steps: tensors of the weight's size, in float32 as the weight itself is then, that its making holds beside it.
    """

    def __init__(self, old: nn.Linear, bits: float, *, steps: int = 0):
        super().__init__(old.in_features, old.out_features, old.bias)
        self.dtype, self.steps = old.weight.dtype, steps
        size = round(old.in_features * old.out_features * bits / 8)
        self.codes = nn.Parameter(old.weight.new_empty(size, dtype=torch.uint8), requires_grad=False)

    def dequantize(self) -> Tensor:
        """A weight [O, I] in the number format of the layer that this one stands for."""
        if not self.steps:
            return self._dense(self.dtype)
        held = [self._dense(torch.float32) for _ in range(self.steps)]
        dense = self._dense(torch.float32)
        del held
        return dense.to(self.dtype)

    def _dense(self, dtype: torch.dtype) -> Tensor:
        return self.codes[:1].expand(self.out_features, self.in_features).to(dtype)


def quantise_fake(model: nn.Module, scheme: str, *, group_size: int | None, bits: float | None) -> None:
    """`quantise_model` for a model without numbers. torchao's layers are what they are; the others are stood for."""
    stands: dict[str, Any] = {
        "nf4": lambda old, _: StandIn(old, _NF4_BITS),
        "fp4": lambda old, _: StandIn(old, _NF4_BITS),
        "int8": lambda old, _: StandIn(old, _INT8_BITS),
    }
    stands |= {f"packed-int{n}": partial(_grid, n) for n in (8, 4, 3, 2)}
    if scheme == "packed-mixed":  # which matrix gets how many bits depends on its numbers; all together on the budget
        assert bits is not None, "the recipe's schema asks for it"
        budget = bits
        scheme, stands["packed-int4"] = "packed-int4", lambda old, _: StandIn(old, budget, steps=_GRID_STEPS)
    with patch.dict(SCHEMES, stands):
        quantise_model(model, scheme, group_size=group_size)


def _grid(bits: int, old: nn.Linear, group_size: int | None) -> nn.Module:
    """Codes, and a scale of 16 bits and a zero point for each group."""
    return StandIn(old, bits + (16 + bits) / (group_size or GROUP_SIZE), steps=_GRID_STEPS)
