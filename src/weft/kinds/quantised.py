"""Quantised linear layers: read through their own forward and a dequantise, never by touching packed bytes."""

from __future__ import annotations

import copy
import sys
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weft.core.affine import Affine, StartOp
from weft.core.site import Site
from weft.kinds.linear import LinearSeat
from weft.kinds.packed import GPTQLinear, PackedLinear, round_to_grid
from weft.kinds.seat import Seat, Weave, base_class


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
    if issubclass(cls, nn.Linear) and weight is not None and hasattr(weight, "__tensor_flatten__"):
        if type(weight.data).dequantize is not Tensor.dequantize:  # a quantised subclass brings its own
            return QuantisedTensorSeat
        return OpaqueTensorSeat if type(weight.data).__name__ in OPAQUE else None
    if issubclass(cls, GPTQLinear):
        return PackedSeat
    sized = hasattr(module, "in_features") and hasattr(module, "out_features")
    known = any(callable(getattr(module, name, None)) for name in ("dequantize", "dequantize_weight"))
    return DequantiseSeat if sized and known else None


def codes_of(module: nn.Module) -> Tensor | None:
    """What a quantised linear layer stores instead of its weight; None for any other module."""
    cls = quantised_seat(module)
    if cls is None or not issubclass(cls, QuantisedSeat):
        return None
    features = {"out_features": module.out_features, "in_features": module.in_features}
    return cls(module, Site("", "linear", **features), Weave()).codes()  # type: ignore[arg-type]


class PackedCall(torch.autograd.Function):
    """A frozen layer's own forward, and dx = W^T dy with W dequantised again: nothing is kept but the layer itself.

    Yin et al. 2023 (ModuLoRA), arXiv 2309.16119.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, seat: QuantisedSeat) -> Tensor:
        ctx.seat, ctx.dtype = seat, x.dtype
        return seat.own_forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return (dy @ ctx.seat.dense().to(dy.dtype)).to(ctx.dtype), None


class QuantisedSeat(LinearSeat):
    """What all quantised layers share: a backward that holds packed weights only, and starts that may rewrite them."""

    def call(self, x: Tensor) -> Tensor:
        plain = torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad)
        bias = self.bias()
        if plain or (bias is not None and bias.requires_grad):
            return self.own_forward(x)
        return PackedCall.apply(x, self)

    def own_forward(self, x: Tensor) -> Tensor:
        """The library's own forward."""
        return super().call(x)

    def linear(self) -> bool:
        bias = self.bias()
        return self.weight_only() and self.inner_forward is None and (bias is None or not bias.requires_grad)

    def weight_only(self) -> bool:
        """Whether the layer is known to multiply its input, as it came, by exactly `dense()`."""
        return True

    @abstractmethod
    def codes(self) -> Tensor:
        """What is stored instead of the weight, as integers: it tells one quantised base from another."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight that the codes stand for, [O, I], in the library's own dtype."""

    def weight(self) -> Tensor:
        return self.dense().to(self.site.dtype)

    def start(self, statistics: Mapping[str, Tensor] | None = None) -> StartOp:
        op = super().start(statistics)
        if statistics is not None and "original" in statistics:
            op.write = self.write_weight
        return op


class Packed4bitSeat(QuantisedSeat):
    """bitsandbytes Linear4bit: NF4 or FP4 codes in blocks, with (doubly quantised) scales in a state object."""

    def codes(self) -> Tensor:
        return self._unpacked()[0]

    def dense(self) -> Tensor:
        return sys.modules["bitsandbytes"].functional.dequantize_4bit(*self._unpacked())

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

    def _unpacked(self) -> tuple[Tensor, Any]:
        """Codes and their state in the library's own order."""
        packed: Any = self.stored()
        data, state = packed.data, packed.quant_state
        if getattr(state, "packing_format_for_cpu", False):  # re-ordered for AVX-512 by an earlier forward
            functional = sys.modules["bitsandbytes"].functional
            return functional._convert_weight_packed_for_cpu_inverse(data, copy.deepcopy(state))
        return data, state

    def _put(self, data: Tensor, state: Any) -> None:
        packed: Any = self.stored()
        packed.data, packed.quant_state = data, state
        self.module.quant_state = state


class Int8Seat(QuantisedSeat):
    """bitsandbytes Linear8bitLt: int8 codes with one scale per output row.

    Its forward quantises the input as well, so it is close to, not equal to, a matmul with the weight.
    """

    def weight_only(self) -> bool:
        return False

    def codes(self) -> Tensor:
        return self._codes()[0]

    def dense(self) -> Tensor:
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


class QuantisedTensorSeat(QuantisedSeat):
    """A linear layer whose weight is a tensor subclass that quantises itself (torchao)."""

    def weight_only(self) -> bool:
        return getattr(self.stored().data, "act_quant_kwargs", None) is None

    def codes(self) -> Tensor:
        stored: Any = self.stored().data
        parts = (getattr(stored, name) for name in stored.__tensor_flatten__()[0])
        integers = next((part for part in parts if not part.is_floating_point()), None)
        return stored.dequantize() if integers is None else integers  # an opaque layout cannot be dequantised

    def dense(self) -> Tensor:
        return self.stored().detach().dequantize()

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


class OpaqueTensorSeat(QuantisedTensorSeat):
    """A weight whose layout only its own kernel knows (torchao's int4 on a CPU): W is read as W applied to I."""

    def dense(self) -> Tensor:
        stored = self.stored().detach()
        eye = torch.eye(self.site.in_features, dtype=stored.dtype, device=stored.device)
        return F.linear(eye, stored).mT


class DequantiseSeat(QuantisedSeat):
    """Any linear-like module with a `dequantize()`: it can be adapted; writing its codes is its own affair."""

    def stored(self) -> Tensor:
        return next(t for t in (*self.module.parameters(recurse=False), *self.module.buffers(recurse=False)))

    def weight_only(self) -> bool:
        return issubclass(self.base, PackedLinear)

    def codes(self) -> Tensor:
        own = (*self.module.parameters(recurse=False), *self.module.buffers(recurse=False))
        return next((t.detach() for t in own if not t.is_floating_point()), self.stored())

    def dense(self) -> Tensor:
        if not hasattr(self.module, "dequantize"):  # GPTQModel's layers: [I, O], whatever the shape says
            value: Tensor = self.module.dequantize_weight().mT  # type: ignore[operator]
        else:
            value = self.module.dequantize()  # type: ignore[operator]
        value = value.detach()
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


class PackedSeat(DequantiseSeat):
    """A layer in GPTQ's layout, which can be written again: rounded to the nearest in the same groups."""

    def check_writable(self, value: Affine) -> None:
        LinearSeat.check_writable(self, value)
        module: Any = self.module
        if not torch.equal(
            module.g_idx.cpu(), torch.arange(module.in_features, dtype=torch.int32) // module.group_size
        ):
            raise TypeError(
                "its groups were chosen by activation order (desc_act), and rounding anew would keep no such order; "
                "serve it unmerged, or load the base without quantisation to merge"
            )

    def write_weight(self, weight: Tensor) -> None:
        module: Any = self.module
        module.write(*round_to_grid(weight, module.bits, module.group_size))

    def snapshot(self) -> Any:
        bias = self.bias()
        kept = {n: getattr(self.module, n).detach().clone() for n in ("qweight", "qzeros", "scales")}
        return kept, None if bias is None else bias.detach().clone()

    def restore(self, saved: Any) -> None:
        kept, bias = saved
        for name, value in kept.items():
            getattr(self.module, name).data.copy_(value)
        if bias is not None:
            self.bias().data.copy_(bias)  # type: ignore[union-attr]


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


def _int4_opaque(old: Any, weight: Tensor) -> Tensor:
    """torchao's Int4OpaqueTensor of a new weight, with the groups of the old one."""
    return type(old).from_hp(weight, old.block_size)


OPAQUE = frozenset({"Int4OpaqueTensor"})
"""Tensor classes that can multiply and not say what they hold."""

REQUANTISE = {"Int8Tensor": _int8_tensor, "Int4OpaqueTensor": _int4_opaque}
"""Tensor classes that can be written again with their own settings."""
