"""Rows packed one after another into one sequence: the table that says where each stands, and attention that keeps them
apart.

The table goes to a transformers model as its `attention_mask`: one of four dimensions is handed to every attention as
it is, also when a layer is computed again in the backward. It stays on the CPU, where its numbers are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["IMPLEMENTATIONS", "allowed", "is_table", "lengths_of", "register", "table"]

IMPLEMENTATIONS = {"sdpa": "weft-sdpa", "flex_attention": "weft-flex"}
"""What a model is loaded with -> the same within segments; with any other mask they are what they replace."""

_block_masks = WeakTensorKeyDictionary()


def table(lengths: Sequence[int], shared: Sequence[int] | None = None) -> Tensor:
    """[1, 1, 2, S]: the length of each segment, and how many first tokens of the segment before it it also sees.

    A rejected answer sees the prompt that stands at the start of the segment before it, and goes on from there (prefix
    sharing: Wang and Hegde 2024, arXiv 2410.20305).
    """
    return torch.tensor([[[list(lengths), list(shared or [0] * len(lengths))]]])


def is_table(mask: Any) -> bool:
    """Whether an attention mask is a table of segments: no mask that a model makes is of whole numbers."""
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.dtype == torch.int64


def lengths_of(mask: Tensor) -> list[int]:
    """How long each segment is."""
    return mask[0, 0, 0].tolist()


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,  # the interface of transformers' attention functions
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, one call a segment: nothing is computed between segments, and nothing is masked.

    query [1, H, N, D], key and value [1, G, N, D] with G dividing H; returns [1, N, H, D]. A graph that is compiled has
    no loop over lengths that it does not know: there it is one call with a mask.
    """
    if not is_table(attention_mask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **more
        )
    assert attention_mask is not None
    causal, window = _kind(module, is_causal, more)
    if torch.compiler.is_compiling():
        place = torch.arange(query.shape[2], device=query.device)
        visible = allowed(attention_mask, size=len(place), causal=causal, window=window, device=query.device)
        mask = visible(None, None, place[:, None], place[None])[None, None]  # [1, 1, N, N]
        return _one(query, key, value, mask, causal=causal, dropout=dropout, scale=scaling), None
    lengths, shared = attention_mask[0, 0].tolist()
    # `split`, not slices: the gradient of a split is written once, that of every slice fills the whole with zeros
    queries, keys, values = (t.split(lengths, dim=2) for t in (query, key, value))
    outputs = []
    for i, count in enumerate(shared):
        k, v = keys[i], values[i]
        if count:
            k, v = (torch.cat([t[i - 1][:, :, :count], t[i]], dim=2) for t in (keys, values))
        mask = None
        if count or (window is not None and k.shape[2] > window):
            mask = _mask(queries[i].shape[2], count, causal, window, query.device)
        outputs.append(_one(queries[i], k, v, mask, causal=causal, dropout=dropout, scale=scaling))
    return torch.cat(outputs, dim=1), None


def _one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, dropout: float, scale: Any) -> Tensor:
    """[1, T, H, D] of one segment."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and mask is not None and q.device.type != "cpu":  # no fused kernel there takes both
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return y.transpose(1, 2)


def _kind(module: nn.Module, is_causal: bool | None, more: dict[str, Any]) -> tuple[bool, int | None]:
    """Whether later tokens are hidden, and how far a token sees. ValueError for what is not computed here."""
    unknown = [name for name in ("softcap", "position_bias", "s_aux", "cache") if more.get(name) is not None]
    if unknown:
        raise ValueError(f"its attention uses {', '.join(unknown)}, which is not computed within segments")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    return bool(causal), more.get("sliding_window")


def _mask(num_queries: int, shared: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """[T, shared + T]: what the tokens of one segment see of the shared ones and of their own."""
    key = torch.arange(shared + num_queries, device=device)
    query = key[shared:, None]
    return _visible(query, key, causal, window)


def _visible(query: Tensor, key: Tensor, causal: bool, window: int | None) -> Tensor:
    """Whether a position sees another of its own row; windows as in transformers' masks."""
    seen = query >= key if causal else (query >= 0) & (key >= 0)
    if window is None:
        return seen
    return seen & (key > query - window if causal else (query - key).abs() <= window)


def allowed(mask: Tensor, *, size: int, causal: bool, window: int | None, device: torch.device) -> Any:
    """The table of `size` tokens as a function of two places (flex attention's `mask_mod`): does one see the other?"""
    lengths, shared = mask[0, 0].to(device)  # [S] each
    stops = lengths.cumsum(0)
    places = torch.arange(size, device=device)
    segment = torch.bucketize(places, stops, right=True)  # [N]
    also = shared[segment]  # of the segment before
    place = places - (stops - lengths)[segment] + also  # as counted from the start of the row

    def mask_mod(batch: Any, head: Any, q: Tensor, k: Tensor) -> Tensor:  # noqa: ARG001
        own = segment[q] == segment[k]
        prompt = (segment[q] == segment[k] + 1) & (place[k] < also[q])
        return (own | prompt) & _visible(place[q], place[k], causal, window)

    return mask_mod


def _attend_flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,  # the interface of transformers' attention functions
) -> tuple[Tensor, Tensor | None]:
    """Flex attention: the table as a block mask, so that blocks between segments are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask
    from transformers.integrations.flex_attention import flex_attention_forward

    if is_table(attention_mask):
        causal, window = _kind(module, is_causal, {k: v for k, v in more.items() if k != "softcap"})
        made = _block_masks.setdefault(attention_mask, {})
        kind = (causal, window, query.device)
        if kind not in made:
            size = query.shape[2]
            visible = allowed(attention_mask, size=size, causal=causal, window=window, device=query.device)
            made[kind] = create_block_mask(visible, B=None, H=None, Q_LEN=size, KV_LEN=size, device=query.device)
        attention_mask = made[kind]
    return flex_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)


def register() -> None:
    """Make both known to transformers, under the names in IMPLEMENTATIONS; their other masks stay what they were."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    for name, function in (("sdpa", _attend), ("flex_attention", _attend_flex)):
        AttentionInterface.register(IMPLEMENTATIONS[name], function)
        ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATIONS[name], ALL_MASK_ATTENTION_FUNCTIONS[name])
