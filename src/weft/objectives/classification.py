"""Classification: the cross entropy of one label per row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.objectives.objective import LossSum, Objective

if TYPE_CHECKING:
    import torch

    from weft.data.batch import Batch

__all__ = ["Classification", "classification_loss"]


class Classification(Objective):
    """Sum over rows of -log p(label | row)."""

    name = "classification"

    @staticmethod
    def loss(model: Any, batch: Batch) -> LossSum:
        """Summed loss in float32, the number of rows, and how many are classified right."""
        logits = model(**batch.inputs()).logits
        if logits.dim() == 3:  # [B, T, C]: a head without pooling answers at the last token of each row
            rows, last = batch.ends()
            logits = logits[rows, last]
        return classification_loss(logits, batch.labels)


def classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> LossSum:
    """The loss from logits [B, C] and class indices [B]."""
    import torch

    loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    return loss, labels.numel(), {"correct": (logits.detach().argmax(-1) == labels).sum()}
