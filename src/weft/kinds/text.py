"""The texts that a model reads: which tokens of a call stand in the last of certain others in their text, or behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.segments import is_table

if TYPE_CHECKING:
    from weft.kinds.call import Prompts

__all__ = ["Text", "begun", "remember"]


@dataclass(eq=False)
class Text:
    """What one call of a model reads.

    ids: its tokens [B, T], and why: why they are not known where they are not. before: the ids [B, P] that its cache
    holds; None where it holds some that nobody noted. seen: how many tokens it holds. mask, places: what tells rows
    apart. kept: of how many last tokens of a row alone the model's head is asked.
    """

    ids: Tensor | None
    why: str
    before: Tensor | None
    seen: int
    mask: Any
    places: Any
    kept: Any
    prompts: Prompts | None
    found: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, given: Mapping[str, Any]) -> Text:
        """That of a call with these arguments, by name, that is about to run."""
        ids, cache, mask = given.get("input_ids"), given.get("past_key_values"), given.get("attention_mask")
        why = ""
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            ids, why = None, "the model was called without input_ids of rows [B, T]"
        elif given.get("write_index") is not None:
            ids, why = None, "the model was called for pages of several texts"
        elif getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            ids, why = None, "a model with an encoder and a decoder reads two texts"
        length = int(cache.get_seq_length()) if cache is not None and hasattr(cache, "get_seq_length") else 0
        plain = ids is not None and isinstance(mask, Tensor) and mask.ndim == 2
        return cls(
            ids=ids,
            why=why,
            before=None if ids is None else _recalled(cache, length, ids),
            seen=max(mask.shape[1] - ids.shape[1], 0) if plain else length,  # type: ignore[union-attr]
            mask=mask,
            places=given.get("position_ids"),
            kept=given.get("logits_to_keep"),
            prompts=model.weave.prompts,
        )

    def at(self, x: Tensor, tokens: tuple[int, ...], address: str) -> Tensor:
        """Which tokens of x [B, T, C], [B T, C] or ids [B, T] stand in the last `tokens` of their text or behind them,
        one channel each.

        In a generation the text is its prompt: what the model writes itself calls nothing. Of tokens that a cache cuts
        in two, those behind the cut have it: what is cached stays.
        """
        if tokens not in self.found:
            self.found[tokens] = self._invoked(tokens, address)
        inside = self.found[tokens]  # [B, T]
        (rows, size), shape = inside.shape, x.shape[:-1] if x.is_floating_point() else x.shape
        if shape == (rows * size,):
            inside = inside.flatten()
        elif len(shape) == 2 and shape[0] == rows and shape[1] > size:  # virtual tokens come before the text
            inside = F.pad(inside, (shape[1] - size, 0))
        elif len(shape) == 2 and shape[0] == rows and shape[1] == self.kept:
            inside = inside[:, -self.kept :]
        if inside.shape != shape:
            raise ValueError(
                f"{address} sees tokens of shape {[*shape]}, and the model was called with {rows} rows of {size}: "
                f"where {list(tokens)} stand is known only where a module sees every row and every token"
            )
        return inside.unsqueeze(-1)

    def _invoked(self, tokens: tuple[int, ...], address: str) -> Tensor:
        asks = f"{address}: this adapter looks for {list(tokens)} in the text"
        if self.ids is None:
            raise ValueError(f"{asks}, and {self.why}: call it with the token ids of whole rows")
        if self.prompts is not None:
            if self.prompts.ids is None:
                raise ValueError(f"{asks}, and it generates from embeddings: generate from input_ids")
            return self._generated(self.ids, self.prompts.ids, tokens)
        if is_table(self.mask):
            return _packed(self.ids, tokens, self.mask)
        if self.before is None:
            inside = begun(self.ids, tokens)
            if not inside[:, -1].all():
                raise ValueError(
                    f"{asks}, and its cache holds {self.seen} tokens that were not noted: fill the cache with the "
                    "model that the adapter is attached to, under any route, or call it with the whole text"
                )
            return inside
        text = torch.cat([self.before, self.ids], 1)  # [B, W]
        real = self.mask if isinstance(self.mask, Tensor) and self.mask.shape == text.shape else None
        segment, places = torch.zeros_like(text), self.places
        if real is None and isinstance(places, Tensor) and places.shape == text.shape:  # rows packed into each
            segment[:, 1:] = (places[:, 1:] != places[:, :-1] + 1).cumsum(1)
        return begun(text, tokens, segment, real)[:, self.before.shape[1] :]

    def _generated(self, ids: Tensor, prompt: Tensor, tokens: tuple[int, ...]) -> Tensor:
        assert self.prompts is not None, "there is a generation"
        inside = begun(prompt, tokens, real=self.prompts.mask).to(ids.device)
        far = torch.iinfo(torch.long).max
        first = torch.where(inside[:, -1], inside.shape[1] - inside.sum(1), far)  # column of the first, or never
        first = self.prompts.of_rows(first.unsqueeze(1), len(ids))  # [B, 1]
        return torch.arange(self.seen, self.seen + ids.shape[1], device=ids.device) >= first


def begun(ids: Tensor, tokens: tuple[int, ...], segment: Tensor | None = None, real: Tensor | None = None) -> Tensor:
    """Which of ids [B, W] stand in the last `tokens` of their row or behind them, [B, W].

    segment: the row of every token, [B, W], where several are packed into one; real: which are no padding.
    """
    width, size = ids.shape[1], len(tokens)
    if width < size:
        return torch.zeros_like(ids, dtype=torch.bool)
    row = torch.zeros_like(ids) if segment is None else segment
    hit = (ids.unfold(1, size, 1) == torch.tensor(tokens, device=ids.device)).all(-1)  # [B, W - size + 1]
    hit = hit & (row[:, : width - size + 1] == row[:, size - 1 :])
    if real is not None:
        hit = hit & real.to(ids.device).bool().unfold(1, size, 1).all(-1)
    place = torch.arange(width, device=ids.device).expand_as(ids)
    start = torch.where(F.pad(hit, (0, size - 1)), place, -1)
    last = torch.full_like(ids, -1).scatter_reduce(1, row, start, "amax").gather(1, row)  # that of every token's row
    return (last >= 0) & (place >= last)


def _packed(ids: Tensor, tokens: tuple[int, ...], table: Tensor) -> Tensor:
    """`begun` for rows packed into one, [1, W], each with the tokens that it shares with the one before it."""
    lengths, shared = table[0, 0].tolist()
    places: list[int] = []
    segment: list[int] = []
    own: list[bool] = []
    stop = length = 0
    for i, (count, borrowed) in enumerate(zip(lengths, shared, strict=True)):
        ahead, stop, length = stop - length, stop + count, count
        places += [*range(ahead, ahead + borrowed), *range(stop - count, stop)]
        segment += [i] * (borrowed + count)
        own += [False] * borrowed + [True] * count
    order, segments, owned = (torch.tensor(each, device=ids.device) for each in (places, segment, own))
    return begun(ids[:, order], tokens, segments.unsqueeze(0))[:, owned]


def _recalled(cache: Any, length: int, ids: Tensor) -> Tensor | None:
    """The ids [B, P] of what a cache holds, for the rows of `ids`; None where it holds tokens that nobody noted."""
    if not length:
        return ids[:, :0]
    noted, known = getattr(cache, "weft_text", (None, 0))
    if noted is None or length > known or len(ids) % len(noted):
        return None
    noted = noted[:, : noted.shape[1] - (known - length)]  # the cache may have been cropped
    return noted.repeat_interleave(len(ids) // len(noted), 0)


def remember(text: Text, given: Mapping[str, Any], result: Any) -> None:
    """Note on the cache that a call has filled what it now holds; a copy of the cache has the note too.

    Not in a generation: it has its prompts, and beams change places in its cache.
    """
    cache = given.get("past_key_values")
    cache = getattr(result, "past_key_values", None) if cache is None else cache
    if text.ids is None or text.before is None or text.prompts is not None or torch.compiler.is_compiling():
        return
    if cache is not None and hasattr(cache, "get_seq_length"):
        cache.weft_text = torch.cat([text.before, text.ids], 1), int(cache.get_seq_length())
