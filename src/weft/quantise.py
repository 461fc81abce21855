"""Quantising a loaded model's linear layers in place, offline and on any device."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from weft.errors import missing_extra, nearest
from weft.kinds import RAW_READERS

__all__ = ["SCHEMES", "quantise_model"]


def quantise_model(model: nn.Module, scheme: str) -> None:
    """Replace the weights of a model's linear layers by quantised ones, except its output head.

    scheme: "nf4" (bitsandbytes, 4 bits, double quantisation), "int8" (bitsandbytes, 8 bits, inputs too), or
        "torchao-int8" (8 bits, weights only).
    Layers whose weight another module reads raw stay as they are: packed bytes would be read as numbers.
    Raises ValueError for an unknown scheme, an adapted model, or a model without such layers; MissingExtra for a
    package that is not installed.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"there is no quantisation {scheme!r}; {nearest(scheme, SCHEMES)}")
    if "weave" in model.__dict__:
        raise ValueError("this model carries adapters: quantise the base first, then attach or load them")
    chosen = _linears(model)
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantise")
    SCHEMES[scheme](model, chosen)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The plain linear layers by path, without the head, what a neighbour reads, and what must stay in float32."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    raw = {
        id(getattr(parent, child, None))
        for parent in model.modules()
        for reader, children in RAW_READERS.items()
        if isinstance(parent, reader)
        for child in children
    }
    # T5 casts the input of `wo` to the dtype of its weight, and would cast it to packed bytes: transformers keeps such
    # layers in float32 too
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    linears = ((p, m) for p, m in model.named_modules() if _is_plain(m) and m is not head and id(m) not in raw)
    return {p: m for p, m in linears if not kept & {*p.split(".")}}


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is no quantised one (torchao swaps the tensor, not the layer)."""
    return type(module) is nn.Linear and type(module.weight.data) is Tensor


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new.train(model.get_submodule(path).training))


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise missing_extra("quant", needs="bitsandbytes") from error
    return bitsandbytes


def _nf4(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    bnb = _bitsandbytes()
    for path, old in chosen.items():
        new = bnb.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=old.weight.dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        new.weight = bnb.nn.Params4bit(
            old.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=new
        )
        new.bias = old.bias
        _replace(model, path, new.to(old.weight.device))


def _int8(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    bnb = _bitsandbytes()
    for path, old in chosen.items():
        bias = old.bias is not None
        new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=bias, has_fp16_weights=False, device="meta")
        new.weight = bnb.nn.Int8Params(old.weight.data, has_fp16_weights=False, requires_grad=False)
        new.bias = old.bias
        _replace(model, path, new.to(old.weight.device))


def _torchao_int8(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise missing_extra("quant", needs="torchao") from error
    ids = {id(m) for m in chosen.values()}
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, _: id(module) in ids)


SCHEMES = {"nf4": _nf4, "int8": _int8, "torchao-int8": _torchao_int8}
"""What `quantise_model` can do, by name."""
