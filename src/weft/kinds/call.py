"""What a model was called with: it says where the tokens that a block sees stand in the prompts of their rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from weft.core.positions import Positions, labels_told
from weft.segments import is_table

__all__ = ["Call", "Prompts"]


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of a generation that runs: how many columns they take, which of these are real, and what they are,
    where known."""

    width: int
    mask: Tensor | None
    ids: Tensor | None = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Prompts | None:
        """Those that `generate` is called with; None where it makes up its own."""
        known = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
        first = next((x for x in known if isinstance(x, Tensor)), None)
        mask = kwargs.get("attention_mask")
        plain = isinstance(mask, Tensor) and mask.ndim == 2
        if first is None:
            return None
        ids = None if first.is_floating_point() else first
        return cls(first.shape[1], mask.bool() if plain else None, ids)  # type: ignore[union-attr]

    def ends(self, rows: int, device: torch.device) -> Tensor:
        """The column behind the last token of every prompt, [B, 1]."""
        if self.mask is None:  # then it can be padded in front only
            return torch.full((rows, 1), self.width, device=device)
        last = torch.where(self.mask, torch.arange(1, self.width + 1, device=self.mask.device), 0).amax(1, keepdim=True)
        return self.of_rows(last, rows).to(device)

    def of_rows(self, each: Tensor, rows: int) -> Tensor:
        """What each prompt has, for all rows of a batch: beams and several sequences of a prompt stand together."""
        return each.repeat_interleave(rows // len(each), 0)


@dataclass(eq=False)
class Call:
    """One forward of a model. A row's prompt starts at its first real token, and ends

    - in `generate`, where the tokens that it was given end: nothing that it makes is a part of it;
    - before the first token that the loss counts, where labels say so (the model's own, or those of `labelled`);
    - otherwise with the row. Tokens behind a cache belong to no prompt then.

    shape: rows and tokens of its input, where it reads tokens. seen: how many a cache held before it. causal: whether
    its tokens see earlier ones only.
    """

    shape: tuple[int, int] | None
    mask: Any
    places: Any
    labels: Any
    seen: int
    prompts: Prompts | None
    has_decoder: bool
    causal: bool
    found: dict[tuple[int, int], Positions] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, given: Mapping[str, Any]) -> Call:
        """A call with these arguments, by name, that is about to run."""
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        past: Any = given.get("past_key_values")
        return cls(
            shape=(tokens.shape[0], tokens.shape[1]) if isinstance(tokens, Tensor) else None,
            mask=given.get("attention_mask"),
            places=given.get("position_ids"),
            labels=given.get("labels") if given.get("labels") is not None else labels_told(),
            seen=int(past.get_seq_length()) if hasattr(past, "get_seq_length") else 0,
            prompts=model.weave.prompts,
            has_decoder=bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)),
            causal=model.weave.causal,
        )

    def positions(self, x: Tensor, address: str) -> Positions:
        """Where the tokens of x [B, T, C] stand that a block of this model sees."""
        if self.has_decoder:
            raise ValueError(f"{address}: a model with an encoder and a decoder has two rows of tokens, not one prompt")
        if x.ndim < 3:
            raise ValueError(f"{address} sees {[*x.shape]}, and tokens have positions in rows: [B, T, C]")
        key = (x.shape[0], x.shape[1])
        if key not in self.found:
            self.found[key] = self._positions(x, address)
        return self.found[key]

    def _positions(self, x: Tensor, address: str) -> Positions:
        if self.shape is None:
            return replace(Positions.of_whole_rows(x), causal=self.causal)
        rows, size = self.shape
        ahead = x.shape[1] - size  # virtual tokens, which come before the prompt
        if ahead < 0 or rows != x.shape[0]:
            raise ValueError(
                f"{address} sees {x.shape[0]} rows of {x.shape[1]} tokens, and the model was called with {rows} of "
                f"{size}: positions are known only where a block sees every row and every token"
            )
        mask = self._mask(rows, size, address)
        seen = self.seen if mask is None else max(mask.shape[1] - size, 0)
        start, end = self._bounds(mask, rows, size, seen, x.device)  # [B, T]
        start, end = (torch.cat([bound[:, :1].expand(-1, ahead), bound], 1) for bound in (start, end))
        column = torch.arange(seen - ahead, seen + size, device=x.device)
        real = None if mask is None else torch.nn.functional.pad(mask[:, seen:], (ahead, 0), value=True).to(x.device)
        return Positions(column - start, end - 1 - column, real, self.causal, is_table(self.mask))

    def _mask(self, rows: int, size: int, address: str) -> Tensor | None:
        """Which tokens are real, [B, seen + T], where that is said; None for all."""
        mask = self.mask
        if mask is None or is_table(mask):
            return None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return mask.bool()
        if self.prompts is not None and self.prompts.mask is not None:
            known = self.prompts.of_rows(self.prompts.mask, rows)
            width = self.seen + size
            return torch.nn.functional.pad(known, (0, max(width - known.shape[1], 0)), value=True)[:, :width]
        raise ValueError(
            f"{address}: this adapter works at positions of a prompt, which an attention mask of one number per token "
            "[B, T] tells; pass the one that the tokenizer made"
        )

    def _bounds(
        self, mask: Tensor | None, rows: int, size: int, seen: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Of every token's prompt, the first column and the one behind the last, [B, T]."""
        width = seen + size
        row, shared = self._rows(rows, width, seen, device)
        place = torch.arange(width, device=device).expand(rows, -1)
        real = torch.ones_like(place, dtype=torch.bool) if mask is None else mask

        def least(where: Tensor, sign: int) -> Tensor:
            """The least (sign 1) or largest (sign -1) place of a row's tokens where something holds, [B, W]."""
            value = torch.where(where, sign * place, width)
            return sign * torch.full_like(place, width).scatter_reduce(1, row, value, "amin").gather(1, row)

        start, labels = least(real, 1) - shared, self.labels
        if self.prompts is not None:
            return start[:, seen:], self.prompts.ends(rows, device).expand(-1, size)
        end = least(real, -1) + 1
        if seen:
            end = end.clamp(max=seen)
        elif isinstance(labels, Tensor) and labels.shape == (rows, width) and not labels.is_floating_point():
            counted = least(labels.to(device) >= 0, 1)
            end = torch.where((counted > start) & (counted < end), counted, end)
        return start[:, seen:], end[:, seen:]

    def _rows(self, rows: int, width: int, seen: int, device: torch.device) -> tuple[Tensor, Tensor | int]:
        """Which of the rows that are packed into one each token belongs to, [B, W], and how many tokens of the one
        before it that row also sees."""
        mask, places = self.mask, self.places
        if is_table(mask):
            lengths, shared = mask[0, 0].to(device)
            row = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=width).unsqueeze(0)
            return row, shared[row]
        row = torch.zeros(rows, width, dtype=torch.long, device=device)
        if mask is None and not seen and isinstance(places, Tensor) and places.shape == (rows, width):
            row[:, 1:] = (places[:, 1:] != places[:, :-1] + 1).cumsum(1)
        return row, 0
