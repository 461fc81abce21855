"""The inside of an attention: keys and values before its own (a prefix), and gated ones beside them (LLaMA-Adapter)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.affine import StartOp
from weft.core.site import Site
from weft.kinds.entry import argument_names
from weft.kinds.seat import Weave, Woven, base_class, prove
from weft.kinds.virtual import VirtualSeat, batched

_CACHES = ("past_key_values", "layer_past")
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size")


class AttentionSeat(VirtualSeat):
    """A self-attention. I is the width of its hidden states, O that of its keys (and of its values)."""

    kind = "attention"

    def __init__(self, module: nn.Module, site: Site, weave: Weave, param: str = "attention"):
        super().__init__(module, site, weave, param)
        self.names = argument_names(self.base)
        self.head_size = head_size(module)
        self.cache = next(name for name in _CACHES if name in self.names)
        self.read = reader_of(module)

    @classmethod
    def shape(cls, module: nn.Module, param: str) -> dict[str, Any]:
        config: Any = module.config
        heads = getattr(module, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None)
        heads = heads or config.num_attention_heads
        width = heads * head_size(module)
        return {"out_features": width, "in_features": config.hidden_size, "has_queries": reader_of(module) is not None}

    def start(self, statistics: Mapping[str, Tensor] | None = None) -> StartOp:
        return StartOp(self.site, self.weight, statistics=statistics)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The attention's forward with what the route adds."""
        forward = self.inner_forward or self.base.forward.__get__(self.module)
        if self.weave.unproved:
            prove(self)
        wishes = [] if self.weave.route is None else self.wishes()
        if not any(w.ahead or w.gated for w in wishes):
            return forward(*args, **kwargs)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        hidden = given[self.names[0]]  # [B, T, I]
        ids = self.ids(hidden.shape[0], hidden.device)
        keys, own = batched([w.stream(0) for w in wishes], ids)
        if keys is None:
            result = forward(*args, **kwargs)
        else:
            values, _ = batched([w.stream(1) for w in wishes], ids)
            assert values is not None
            mask = self._mask(given.get("attention_mask"), own, hidden, keys.shape[1])
            # without a mask no key lies behind the queries but the empty ones of a static cache
            length = hidden.shape[1] if given.get("attention_mask") is None and hidden.shape[1] > 1 else None
            prefix = self._heads(keys, hidden), self._heads(values, hidden)
            prefixed = Prefixed(given.get(self.cache), *prefix, length)
            result = forward(**{**given, self.cache: prefixed, "attention_mask": mask})
            prefixed.check_used(self.site.address)
        for index in range(max(len(w.gated) for w in wishes)):
            beside = [w.gated[index] if index < len(w.gated) else None for w in wishes]
            result = (result[0] + self._gated(beside, ids, hidden, given), *result[1:])
        return result

    def _heads(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """[B or 1, N, heads * size] -> [B, heads, N, size]."""
        rows = rows.to(hidden.dtype).expand(hidden.shape[0], -1, -1)
        return rows.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def _mask(self, mask: Any, own: Tensor | None, hidden: Tensor, n: int) -> Any:
        """The attention mask with n columns in front: all visible, or [B, N] of them."""
        queries = hidden.shape[1]
        how = getattr(self.module.config, "_attn_implementation", "eager")
        if mask is None and own is None and (queries == 1 or "flash" in how or not self.module.is_causal):
            return None
        if mask is None:  # what the kernel would have assumed: every query sees the keys up to its own
            mask = torch.ones(1, 1, queries, queries, dtype=torch.bool, device=hidden.device)
            mask = mask.tril() if self.module.is_causal else mask
            if how == "eager":
                mask = _additive(mask, hidden.dtype)
        if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
            raise TypeError(
                f"{self.site.address}: an attention prefix needs the mask as a tensor, and `{how}` gives "
                f"{type(mask).__name__}; load the model with attn_implementation='sdpa'"
            )
        own = torch.ones(1, n, dtype=torch.bool, device=hidden.device) if own is None else own
        if mask.ndim == 2:
            return torch.cat([own.to(mask.dtype).expand(mask.shape[0], -1), mask], dim=1)
        if mask.dtype != torch.bool:
            own = _additive(own, mask.dtype)
        rows = max(mask.shape[0], own.shape[0])
        ahead = own[:, None, None].expand(rows, mask.shape[1], mask.shape[2], -1)
        return torch.cat([ahead, mask.expand(rows, -1, -1, -1)], dim=-1)

    def _gated(
        self, beside: list[tuple[Tensor, Tensor] | None], ids: Tensor | None, hidden: Tensor, given: dict[str, Any]
    ) -> Tensor:
        """gate * softmax(q k^T / sqrt(size)) v of hidden states beside the input, in a softmax of their own."""
        assert self.read is not None, "a method that attends checks `site.has_queries`"
        states, own = batched([None if b is None else b[0] for b in beside], ids)
        assert states is not None
        known = next(b[1] for b in beside if b is not None)
        gates = torch.stack([known.new_zeros(1) if b is None else b[1] for b in beside])  # [K, 1]
        gate = gates if ids is None else gates[ids]
        queries, keys, values = self.read(self.module, hidden, states.to(hidden.dtype), given)
        groups = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        scores = queries @ keys.mT * self.head_size**-0.5  # [B, H, T, N]
        if own is not None:
            scores = scores.masked_fill(~own[:, None, None], torch.finfo(scores.dtype).min)
        wide = torch.promote_types(scores.dtype, torch.float32)  # float64 stays: its least number is -inf in float32
        weights = gate.to(scores.dtype)[:, :, None, None] * scores.softmax(-1, dtype=wide).to(scores.dtype)
        return _output(self.module, (weights @ values).transpose(1, 2).flatten(2))


class WovenAttention(Woven):
    """An attention with virtual keys and values."""

    seat: AttentionSeat

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.seat.enter(args, kwargs)


class Prefixed:
    """A key-value cache seen by one attention: what it returns has the prefix in front, what it stores has not.

    So the cache holds the user's tokens only: beams reorder it, a static one has its size, and without a cache
    (training, checkpointed layers) the prefix is there all the same.
    """

    def __init__(self, cache: Any, keys: Tensor, values: Tensor, length: int | None = None):
        self._cache, self._keys, self._values, self._length, self._used = cache, keys, values, length, False

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The cache's own update, with the prefix put before what it returns, [B, H, N + T, D]."""
        self._used = True
        if self._cache is not None:
            keys, values = self._cache.update(keys, values, *args, **kwargs)
        if keys.shape[1] != self._keys.shape[1] or keys.shape[3] != self._keys.shape[3]:
            raise ValueError(
                f"this attention has {keys.shape[1]} key heads of size {keys.shape[3]}, and its configuration says "
                f"{self._keys.shape[1]} of {self._keys.shape[3]}: a prefix does not fit it; leave it out with exclude"
            )
        keys, values = keys[:, :, : self._length], values[:, :, : self._length]
        return torch.cat([self._keys, keys], dim=2), torch.cat([self._values, values], dim=2)

    def check_used(self, address: str) -> None:
        """RuntimeError when the attention has not read its keys through the cache."""
        if not self._used:
            raise RuntimeError(
                f"{address}: this attention takes its keys from another layer, so its prefix did nothing; "
                "leave it out with exclude"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


NO_QUERIES = (
    "its queries cannot be recomputed: LLaMA-Adapter reads attentions with q_proj, k_proj, v_proj, o_proj and rotary "
    "positions (Llama, Mistral, Qwen2) and GPT-2's c_attn"
)


def is_attention(module: nn.Module) -> bool:
    """Whether a module is a self-attention that stores its keys and values in a cache that it is given."""
    if head_size(module) == 0 or not hasattr(module, "is_causal") or not hasattr(module, "config"):
        return False
    names = argument_names(base_class(module))
    if getattr(module, "is_cross_attention", "encoder_hidden_states" in names) or "key_value_states" in names:
        return False
    return "attention_mask" in names and any(name in names for name in _CACHES)


def head_size(module: nn.Module) -> int:
    """Size of one head, 0 for a module that is no attention."""
    return next((getattr(module, n) for n in _HEAD_SIZES if isinstance(getattr(module, n, None), int)), 0)


def reader_of(module: nn.Module) -> Any:
    """The function that gives queries of hidden states and keys and values of others, or None."""
    children = module._modules
    if {"q_proj", "k_proj", "v_proj", "o_proj"} <= children.keys() and not {"q_norm", "k_norm"} & children.keys():
        rotate = _rotary(base_class(module))
        rotary = rotate is not None and "position_embeddings" in argument_names(base_class(module))
        return partial(_read_rotary, rotate) if rotary else None
    return _read_fused if {"c_attn", "c_proj"} <= children.keys() and hasattr(module, "split_size") else None


def _rotary(cls: type[nn.Module]) -> Any:
    """The rotation that the attention's own file applies to queries and keys."""
    rotate = getattr(sys.modules.get(cls.__module__), "apply_rotary_pos_emb", None)
    if rotate is None or [*inspect.signature(rotate).parameters][:4] != ["q", "k", "cos", "sin"]:
        return None
    return rotate


def _read_rotary(
    rotate: Any, module: Any, hidden: Tensor, states: Tensor, given: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    queries = _split(module, module.q_proj(hidden))
    queries, _ = rotate(queries, queries, *given["position_embeddings"])
    return queries, _split(module, module.k_proj(states)), _split(module, module.v_proj(states))


def _read_fused(module: Any, hidden: Tensor, states: Tensor, _given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    queries = module.c_attn(hidden).split(module.split_size, dim=2)[0]
    _, keys, values = module.c_attn(states).split(module.split_size, dim=2)
    return _split(module, queries), _split(module, keys), _split(module, values)


def _split(module: Any, rows: Tensor) -> Tensor:
    return rows.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)  # [B, H, T, D]


def _output(module: Any, heads: Tensor) -> Tensor:
    """The output projection, whose bias the attention itself has added. GPT-2's is left out, as in HF PEFT."""
    if "o_proj" not in module._modules:
        return heads
    y, bias = module.o_proj(heads), module.o_proj.bias
    return y if bias is None else y - bias


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of what is visible as what is added to scores: 0, or the least number."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
