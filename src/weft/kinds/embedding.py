"""Embeddings: a linear map of one-hot token ids, read by looking rows up."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from weft.core.op import LookupOp, Op
from weft.kinds.seat import Seat


class EmbeddingSeat(Seat):
    """I is the vocabulary and O the width; the table is stored as [I, O]."""

    kind = "embedding"

    @classmethod
    def shape(cls, module: nn.Module, param: str) -> dict[str, Any]:
        return {"out_features": module.embedding_dim, "in_features": module.num_embeddings}

    def make_op(self) -> Op:
        return LookupOp(self.site, self)

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.mT
