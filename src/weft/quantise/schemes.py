"""What one linear layer becomes, by the name of the scheme."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from weft.errors import QuantiseError, missing_extra
from weft.kinds.packed import GPTQLinear

__all__ = ["GROUP_SIZE", "SCHEMES", "packed"]

GROUP_SIZE = 64
"""Weights that share a scale, where the scheme leaves the choice and none was made."""


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise missing_extra("quant", needs="bitsandbytes") from error
    return bitsandbytes


def _four_bits(kind: str, old: nn.Linear, _group_size: int | None) -> nn.Module:
    bnb = _bitsandbytes()
    new = bnb.nn.Linear4bit(
        old.in_features,
        old.out_features,
        bias=old.bias is not None,
        compute_dtype=old.weight.dtype,
        compress_statistics=True,
        quant_type=kind,
        device="meta",
    )
    new.weight = bnb.nn.Params4bit(
        old.weight.data, requires_grad=False, compress_statistics=True, quant_type=kind, module=new
    )
    new.bias = old.bias
    return new.to(old.weight.device)


def _int8(old: nn.Linear, _group_size: int | None) -> nn.Module:
    bnb = _bitsandbytes()
    bias = old.bias is not None
    new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=bias, has_fp16_weights=False, device="meta")
    new.weight = bnb.nn.Int8Params(old.weight.data, has_fp16_weights=False, requires_grad=False)
    new.bias = old.bias
    return new.to(old.weight.device)


def _torchao(config: Callable[[nn.Linear, int | None], Any], old: nn.Linear, group_size: int | None) -> nn.Module:
    try:
        from torchao.quantization import quantize_

        chosen = config(old, group_size)
    except ImportError as error:
        raise missing_extra("quant", needs="torchao") from error
    new = nn.Linear(old.in_features, old.out_features, bias=False, device="meta")
    new.weight, new.bias = old.weight, old.bias
    quantize_(new, chosen, filter_fn=lambda module, _: module is new)
    return new


def _torchao_int8(_old: nn.Linear, _group_size: int | None) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _torchao_int4(old: nn.Linear, group_size: int | None) -> Any:
    """On a CPU its kernel for packed four bits, which torchao 0.18 keeps among its prototypes; on a GPU tinygemm's."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int4WeightOnlyConfig

    group_size = group_size or GROUP_SIZE
    if old.in_features % group_size:
        raise QuantiseError(
            f"torchao-int4 needs inputs in multiples of its group_size={group_size}, and a layer has "
            f"{old.in_features}; choose a smaller group_size, or packed-int4, which has no such limit"
        )
    if old.weight.device.type == "cpu":
        return PrototypeInt4WeightOnlyConfig(group_size=group_size, set_inductor_config=False)
    return Int4WeightOnlyConfig(
        group_size=group_size, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )


def packed(old: nn.Linear, bits: int, group_size: int | None) -> nn.Module:
    """GPTQ's layout, rounded to the nearest: needs no package."""
    return GPTQLinear.of(old.weight.detach(), old.bias, bits, group_size or GROUP_SIZE)


def _packed(bits: int, old: nn.Linear, group_size: int | None) -> nn.Module:
    return packed(old, bits, group_size)


SCHEMES: dict[str, Callable[[nn.Linear, int | None], nn.Module]] = {
    "nf4": partial(_four_bits, "nf4"),
    "int8": _int8,
    "torchao-int8": partial(_torchao, _torchao_int8),
    "torchao-int4": partial(_torchao, _torchao_int4),
    "fp4": partial(_four_bits, "fp4"),
    "packed-int8": partial(_packed, 8),
    "packed-int4": partial(_packed, 4),
    "packed-int3": partial(_packed, 3),
    "packed-int2": partial(_packed, 2),
}
"""Makes a quantised layer of a linear one, given the group size (None: the default)."""
