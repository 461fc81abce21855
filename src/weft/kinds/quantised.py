"""Quantised linear layers: read through their own forward and a dequantise, never by touching packed bytes."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.affine import Affine
from weft.kinds.linear import LinearSeat
from weft.kinds.seat import Seat, base_class


def quantised_seat(module: nn.Module) -> type[Seat] | None:
    """The seat class of a quantised linear layer, or None for a module that is not one.

    No quantisation library is imported here: a layer of one that was never imported cannot exist.
    """
    cls = base_class(module)
    bitsandbytes = sys.modules.get("bitsandbytes")
    weight = module._parameters.get("weight")
    if bitsandbytes is not None:
        if issubclass(cls, bitsandbytes.nn.Linear4bit):
            return Packed4bitSeat if getattr(weight, "quant_state", None) is not None else None
        if issubclass(cls, bitsandbytes.nn.Linear8bitLt):
            return Int8Seat if weight is not None and weight.dtype == torch.int8 else None
    if issubclass(cls, nn.Linear) and weight is not None and _is_quantised_tensor(weight):
        return QuantisedTensorSeat
    sized = hasattr(module, "in_features") and hasattr(module, "out_features")
    return DequantiseSeat if sized and callable(getattr(module, "dequantize", None)) else None


def _is_quantised_tensor(weight: Tensor) -> bool:
    own = getattr(type(weight), "dequantize", None)  # every tensor has one; a quantised subclass brings its own
    return own is not None and own is not Tensor.dequantize and hasattr(weight, "__tensor_flatten__")


class Packed4bitSeat(LinearSeat):
    """bitsandbytes Linear4bit: NF4 or FP4 codes in blocks, with (doubly quantised) scales in a state object."""

    def weight(self) -> Tensor:
        functional = sys.modules["bitsandbytes"].functional
        packed: Any = self.stored()
        data, state = packed.data, packed.quant_state
        if getattr(state, "packing_format_for_cpu", False):  # re-ordered for AVX-512 by an earlier forward
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.deepcopy(state))
        return functional.dequantize_4bit(data, state).to(self.site.dtype)

    def write_weight(self, weight: Tensor) -> None:
        packed: Any = self.stored()
        data, state = sys.modules["bitsandbytes"].functional.quantize_4bit(
            weight.to(packed.quant_state.dtype).contiguous(),
            blocksize=packed.blocksize,
            compress_statistics=packed.compress_statistics,
            quant_type=packed.quant_type,
            quant_storage=packed.quant_storage,
        )
        self._put(data, state)

    def snapshot(self) -> Any:
        packed: Any = self.stored()  # `write_weight` puts new objects in their place, so these keep their bits
        bias = self.bias()
        return (packed.data, packed.quant_state), None if bias is None else bias.detach().clone()

    def restore(self, saved: Any) -> None:
        (data, state), bias = saved
        device = self.stored().device
        if data.device != device:
            state.to(device)
        self._put(data.to(device), state)
        if bias is not None:
            self.bias().data.copy_(bias)  # type: ignore[union-attr]

    def _put(self, data: Tensor, state: Any) -> None:
        packed: Any = self.stored()
        packed.data, packed.quant_state = data, state
        self.module.quant_state = state


class Int8Seat(LinearSeat):
    """bitsandbytes Linear8bitLt: int8 codes with one scale per output row.

    Its forward quantises the input as well, so it is close to, not equal to, a matmul with the weight.
    """

    def weight(self) -> Tensor:
        codes, scales = self._codes()
        return (codes.to(self.site.dtype) * (scales / 127).to(self.site.dtype)[:, None]).view(self.site.shape)

    def write_weight(self, weight: Tensor) -> None:
        quantise = sys.modules["bitsandbytes"].functional.int8_vectorwise_quant
        codes, scales, _ = quantise(weight.to(torch.float16).contiguous())  # the dtype that the library quantises from
        self._copy(codes, scales)

    def snapshot(self) -> Any:
        bias = self.bias()
        return tuple(t.clone() for t in self._codes()), None if bias is None else bias.detach().clone()

    def restore(self, saved: Any) -> None:
        codes, bias = saved
        self._copy(*codes)
        if bias is not None:
            self.bias().data.copy_(bias)  # type: ignore[union-attr]

    def _codes(self) -> tuple[Tensor, Tensor]:
        """Codes and scales: on the parameter until the first forward, in the module's state after it."""
        holder: Any = self.module.state if self.module.state.CB is not None else self.stored()  # type: ignore[union-attr]
        return holder.CB, holder.SCB

    def _copy(self, codes: Tensor, scales: Tensor) -> None:
        for mine, new in zip(self._codes(), (codes, scales), strict=True):
            mine.copy_(new)
        self.stored().data.copy_(codes)  # the same memory, except where a move to another device has split it


class QuantisedTensorSeat(LinearSeat):
    """A linear layer whose weight is a tensor subclass that quantises itself (torchao)."""

    def weight(self) -> Tensor:
        return self.stored().detach().dequantize().to(self.site.dtype)

    def check_writable(self, value: Affine) -> None:
        super().check_writable(value)
        if type(self.stored().data).__name__ not in REQUANTISE:
            raise TypeError(
                f"its weight is a {type(self.stored().data).__name__}, which cannot be re-quantised with the same "
                f"settings (known: {', '.join(REQUANTISE)}); dequantise the layer first, or serve it unmerged"
            )

    def write_weight(self, weight: Tensor) -> None:
        old: Any = self.stored().data
        self.stored().data.copy_(REQUANTISE[type(old).__name__](old, weight.to(old.dtype)))


class DequantiseSeat(LinearSeat):
    """Any linear-like module with a `dequantize()`: it can be adapted; writing its codes is its own affair."""

    def stored(self) -> Tensor:
        return next(t for t in (*self.module.parameters(recurse=False), *self.module.buffers(recurse=False)))

    def weight(self) -> Tensor:
        value: Tensor = self.module.dequantize()  # type: ignore[operator]
        value = value.detach().to(self.site.dtype)
        if value.shape == self.site.shape:
            return value
        if value.mT.shape == self.site.shape:
            return value.mT
        raise TypeError(f"{self.site.address}: dequantize() gives {tuple(value.shape)}, expected {self.site.shape}")

    def check_writable(self, value: Affine) -> None:
        raise TypeError(
            f"{type(self.module).__name__} can be dequantised and not quantised again; serve it unmerged, or load the "
            "base without quantisation to merge"
        )


def _int8_tensor(old: Any, weight: Tensor) -> Tensor:
    """torchao's Int8Tensor of a new weight, with the granularity and range of the old one."""
    from torchao.quantization import PerGroup, PerRow, PerTensor
    from torchao.quantization.quant_primitives import MappingType

    rows, columns = old.block_size
    if rows == 1:
        granularity = PerRow() if columns == weight.shape[1] else PerGroup(columns)
    else:
        granularity = PerTensor()
    symmetric = old.zero_point is None or not old.zero_point.any()
    return type(old).from_hp(
        weight,
        granularity,
        mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
        act_quant_kwargs=old.act_quant_kwargs,
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        act_pre_scale=old.act_pre_scale,
        reduce_range=old.reduce_range,
    )


REQUANTISE = {"Int8Tensor": _int8_tensor}
"""Tensor classes that can be written again with their own settings."""
