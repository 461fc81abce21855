"""Examples to tensors: padded on the right to the longest of the batch, with the counts that exact averages need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.data.rows import IGNORED, Example

if TYPE_CHECKING:
    import torch

__all__ = ["Batch", "collate"]


@dataclass(frozen=True)
class Batch:
    """One batch. The loss of several batches is the sum of their losses over the sum of their `num_trained`: exact for
    uneven rows, while a mean of means is not."""

    input_ids: torch.Tensor  # [B, T]
    attention_mask: torch.Tensor  # [B, T]
    labels: torch.Tensor  # [B, T], IGNORED where nothing is learnt; [B] for classification
    num_trained: int  # positions (or rows) that carry loss
    num_tokens: int  # without padding

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            num_trained=self.num_trained,
            num_tokens=self.num_tokens,
        )


def collate(examples: Sequence[Example], *, pad_token: int, multiple_of: int = 1) -> Batch:
    """A batch of examples; its width is the longest of them, rounded up to `multiple_of`."""
    import torch

    longest = max(len(example.input_ids) for example in examples)
    width = -(-longest // multiple_of) * multiple_of
    input_ids = torch.full((len(examples), width), pad_token, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    classes: list[int] = []
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids, dtype=torch.long)
        attention_mask[row, :length] = 1
        if isinstance(example.labels, int):
            classes.append(example.labels)
        else:
            labels[row, :length] = torch.tensor(example.labels, dtype=torch.long)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=torch.tensor(classes) if classes else labels,
        num_trained=sum(example.num_trained for example in examples),
        num_tokens=sum(len(example.input_ids) for example in examples),
    )
