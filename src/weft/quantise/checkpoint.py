"""Quantised checkpoints: reading GPTQ, AWQ and HQQ files in plain torch, and writing what Weft has quantised."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from weft.errors import QuantiseError
from weft.kinds.packed import AWQLinear, GPTQLinear, HQQLinear, PackedLinear
from weft.kinds.seat import base_class

__all__ = ["reading", "write_quantised"]

_HQQ_FACTS = (
    r"\.(nbits|group_size|axis|shape|packing|unpack_view_dtype|view_as_float|compute_dtype|offload_meta|"
    r"encoded_state_dict|stores_quant_config|channel_wise|optimize|round_zero|quant_scale|quant_zero)$"
)
"""What HQQ stores of every layer beside its tensors."""
NAME = "weft-packed"
"""What transformers calls our reader of packed layouts."""


@contextmanager
def reading(config: Any) -> Iterator[None]:
    """Inside the `with`, from_pretrained(config=config) reads a GPTQ, AWQ or HQQ checkpoint without its own library.

    Where that library is installed and can run here, transformers uses it as always. `config` says afterwards what it
    said before.
    """
    said = getattr(config, "quantization_config", None)
    own = dict(said) if isinstance(said, Mapping) else None
    if own is None or own.get("quant_method") not in ("gptq", "awq", "hqq") or _has_library(own["quant_method"]):
        yield
        return
    _register()
    config.quantization_config = {"quant_method": NAME, "packed": own}
    try:
        yield
    finally:
        config.quantization_config = own


def _has_library(method: str) -> bool:
    if method == "hqq":  # transformers runs it on a GPU only
        return torch.cuda.is_available() and importlib.util.find_spec("hqq") is not None
    return all(importlib.util.find_spec(name) is not None for name in ("gptqmodel", "optimum"))


@cache
def _register() -> None:
    """Tell transformers about the reader; once per process."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(NAME)
    class PackedConfig(QuantizationConfigMixin):
        def __init__(self, packed: Mapping[str, Any], quant_method: str = NAME, **_: Any):
            self.quant_method: Any = quant_method
            self.packed = dict(packed)

    @register_quantizer(NAME)
    class PackedReader(HfQuantizer):
        requires_calibration = False
        quantization_config: Any

        def _process_model_before_weight_loading(
            self, model: nn.Module, checkpoint_files: Any = None, **_: Any
        ) -> nn.Module:
            _make_room(model, checkpoint_files or (), self.quantization_config.packed)
            return model

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            model.config.quantization_config = self.quantization_config.packed  # what the files say of themselves
            return model

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True


def _make_room(model: nn.Module, files: Any, said: Mapping[str, Any]) -> None:
    """Replace the linear layers that are packed in the files by empty ones of their layout."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for file in files:
        with safe_open(file, "pt") as stored:
            keys = {*stored.keys()}
            for key in sorted(k for k in keys if k.endswith((".qweight", ".W_q"))):
                path = key.rpartition(".")[0]
                shapes = {
                    leaf: tuple(stored.get_slice(f"{path}.{leaf}").get_shape())
                    for leaf in ("qweight", "qzeros", "W_q")
                    if f"{path}.{leaf}" in keys
                }
                scalars = {
                    leaf: int(stored.get_tensor(f"{path}.{leaf}"))
                    for leaf in ("nbits", "group_size", "axis")
                    if f"{path}.{leaf}" in keys
                }
                here = next((p for p in (path, path.removeprefix(prefix), prefix + path) if _linear(model, p)), None)
                if here is None:
                    continue
                _swap(model, here, lambda old, s=shapes, n=scalars: _empty(old, s, n, said))
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    model._keys_to_ignore_on_load_unexpected = {*ignored, _HQQ_FACTS}  # type: ignore[assignment]


def _linear(model: nn.Module, path: str) -> bool:
    try:
        return type(model.get_submodule(path)) is nn.Linear
    except AttributeError:
        return False


def _swap(model: nn.Module, path: str, make: Any) -> None:
    parent, _, child = path.rpartition(".")
    with torch.device("meta"):
        setattr(model.get_submodule(parent), child, make(model.get_submodule(path)))


def _empty(
    old: nn.Linear, shapes: Mapping[str, tuple[int, ...]], scalars: Mapping[str, int], said: Mapping[str, Any]
) -> PackedLinear:
    """An empty packed layer of a stored one's shapes: these say bits and groups, whatever exceptions the file lists."""
    method, size = said["quant_method"], (old.in_features, old.out_features)
    if method == "hqq":
        params = {**_hqq_params(said), **scalars}
        return HQQLinear(*size, params["nbits"], params["group_size"], params["axis"], bias=old.bias)
    groups = shapes["qzeros"][0]
    group_size = -(-old.in_features // groups)
    if said.get("group_size", -1) > 0 and -(-old.in_features // said["group_size"]) == groups:
        group_size = said["group_size"]
    if method == "awq":
        if str(said.get("version", "gemm")).lower() != "gemm" or said.get("bits", said.get("w_bit", 4)) != 4:
            raise QuantiseError(
                f"an AWQ checkpoint of version {said.get('version')!r}: only gemm with 4 bits can be read"
            )
        return AWQLinear(*size, group_size, bias=old.bias)
    bits = shapes["qweight"][0] * 32 // old.in_features
    offset = 0 if said.get("checkpoint_format") == "gptq_v2" else 1
    return GPTQLinear(*size, bits, group_size, bias=old.bias, offset=offset)


def _hqq_params(said: Mapping[str, Any]) -> dict[str, Any]:
    config = said.get("quant_config") or {}
    found: Mapping[str, Any] = config.get("weight_quant_params") or next(
        (layer["weight_quant_params"] for layer in config.values() if isinstance(layer, Mapping)), {}
    )
    return {"nbits": found.get("nbits", 4), "group_size": found.get("group_size", 64), "axis": found.get("axis", 1)}


def write_quantised(model: Any, folder: Path, tokenizer: Any = None) -> Path:
    """A model that Weft quantised, without its adapters, as a folder that transformers and Weft load.

    Raises QuantiseError for a scheme whose layers cannot be stored as files.
    """
    said = quantization_config(model)
    state = {k: v for k, v in model.state_dict().items() if ".adapters." not in f".{k}"}
    before = getattr(model.config, "quantization_config", None)
    model.config.quantization_config = said
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        if before is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """What config.json says of a model that Weft quantised."""
    scheme = model.__dict__.get("quantised_as", {}).get("scheme")
    if scheme in ("nf4", "fp4"):
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": scheme,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": _compute_dtype(model),
            "llm_int8_skip_modules": [path for path, m in model.named_modules() if base_class(m) is nn.Linear],
        }
    packed: dict[str, Any] = {path: m for path, m in model.named_modules() if isinstance(m, GPTQLinear)}
    if not packed:
        raise QuantiseError(
            f"a base in {scheme or 'a scheme that Weft did not choose'} cannot be stored; nf4, fp4 and packed-* can"
        )
    kinds = [(m.bits, m.group_size) for m in packed.values()]
    bits, group_size = max(set(kinds), key=kinds.count)
    others = {p: {"bits": m.bits, "group_size": m.group_size} for p, m in packed.items()}
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": False,
        "desc_act": False,
        "checkpoint_format": "gptq_v2",
        # GPTQModel's way to say that a layer differs: a regular expression of its path, marked with a plus
        "dynamic": {
            f"+:{p.replace('.', '[.]')}$": v
            for p, v in others.items()
            if (v["bits"], v["group_size"]) != (bits, group_size)
        },
    }


def _compute_dtype(model: nn.Module) -> str:
    found: Any = next((getattr(m, "compute_dtype", None) for m in model.modules() if hasattr(m, "compute_dtype")), None)
    return str(found or torch.float32).removeprefix("torch.")
