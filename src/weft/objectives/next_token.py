"""Next-token prediction: the cross entropy of each trained token given what stands before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.data.rows import IGNORED
from weft.objectives.objective import LossSum, Objective

if TYPE_CHECKING:
    import torch

    from weft.data.batch import Batch

__all__ = ["NextToken", "next_token_loss"]


class NextToken(Objective):
    """Sum over trained positions of -log p(token | tokens before it)."""

    name = "causal-lm"

    @staticmethod
    def loss(model: Any, batch: Batch) -> LossSum:
        """Summed loss in float32, the number of trained tokens, and how many of them are the most likely token."""
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits  # [B, T, V]
        return next_token_loss(logits, batch.labels)


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> LossSum:
    """The loss from logits [B, T, V] and labels [B, T]; position t of the logits predicts label t + 1."""
    import torch

    targets = labels[:, 1:]  # [B, T - 1]
    trained = targets != IGNORED
    # the trained rows are picked before the cast, so that prompts and padding cost no float32 vocabulary rows
    picked, targets = logits[:, :-1][trained].float(), targets[trained]  # [N, V], [N]
    loss = torch.nn.functional.cross_entropy(picked, targets, reduction="sum")
    return loss, targets.numel(), {"correct": (picked.detach().argmax(-1) == targets).sum()}
