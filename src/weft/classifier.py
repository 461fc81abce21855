"""A classifier made of a pretrained network: its hidden states, pooled, and one linear head."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from weft.segments import is_table, lengths_of

__all__ = ["HEAD", "PooledClassifier", "make_classifier"]

HEAD = "head"
"""The address of the head: a classifier trains it in full."""


class PooledClassifier(nn.Module):
    """logits = head(pool(backbone(tokens))). The head starts at zero, so that the same base is always the same model.

    pooling: "mean" over the tokens of a row (encoders), or "last" of them (causal models, where only it has seen all).
    """

    def __init__(self, backbone: PreTrainedModel, num_labels: int, *, pooling: Literal["mean", "last"] = "mean"):
        super().__init__()
        like = next(p for p in backbone.parameters() if p.is_floating_point())
        self.backbone, self.pooling = backbone, pooling
        self.config: Any = backbone.config
        width = self.config.get_text_config().hidden_size
        dtype = like.dtype if like.dtype.itemsize >= 4 else torch.float32
        self.head = nn.Linear(width, num_labels, device=like.device, dtype=dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """What the head reads: one vector a row, [B, C]; of packed rows, one a segment."""
        places = {} if position_ids is None else {"position_ids": position_ids}
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **places)
        hidden = output.last_hidden_state.to(self.head.weight.dtype)  # [B, T, C]
        if is_table(attention_mask):
            rows = hidden[0].split(lengths_of(attention_mask))
            return torch.stack([row[-1] if self.pooling == "last" else row.mean(dim=0) for row in rows])
        if self.pooling == "last":
            last = attention_mask.sum(dim=1) - 1  # [B]
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [B, T, 1]
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits [B, classes] and, with labels [B], their mean loss."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self.head(self.features(input_ids, mask, position_ids))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def activation_checkpointing_enable(self, options: dict[str, Any] | None = None) -> None:
        """Recompute the backbone's activations."""
        self.backbone.activation_checkpointing_enable(options)

    def activation_checkpointing_disable(self) -> None:
        """Keep them."""
        self.backbone.activation_checkpointing_disable()


def make_classifier(model: nn.Module, num_labels: int) -> PooledClassifier:
    """Put a head on a transformers model: mean pooling for an encoder, the last token for a model that generates.

    Raises TypeError for a network that is not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is not a transformers model, and only these say where hidden states are"
        )
    generates = model.can_generate()
    backbone: Any = model.base_model
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # a head of its own, which mean pooling does not use
    return PooledClassifier(backbone, num_labels, pooling="last" if generates else "mean")
