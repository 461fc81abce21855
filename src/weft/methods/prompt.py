"""Prompt tuning: trained embeddings before those of the input."""

from dataclasses import dataclass
from typing import Literal

import torch

from weft.core import Method, option


@dataclass(frozen=True)
class PromptTuning(Method):
    """y = f([P; E x]) with trained rows P [N, C] before the embeddings E x of the input.

    Lester, Al-Rfou & Constant 2021, arXiv 2104.08691. Results have the length of the input without the rows.
    """

    name = "prompt"
    paper = "2104.08691"
    kinds = frozenset({"input"})
    default_targets = "input"
    num_tokens: int = option(8, help="virtual tokens before the input", minimum=1)
    init_text: str | None = option(None, help="start from the embeddings of this text, repeated or cut to fit")
    init_ids: tuple[int, ...] | None = option(None, help="start from the embeddings of these token ids, likewise")
    start: Literal["vocabulary", "normal"] = option("vocabulary", help="without a text: random tokens, or Gaussian")

    def check(self, site):
        if self.init_text is not None and self.init_ids is not None:
            raise ValueError("init_text and init_ids both say what to start from; give one")
        if self.init_ids is not None and not all(0 <= i < site.in_features for i in self.init_ids):
            raise ValueError(f"init_ids={self.init_ids}: the vocabulary has ids 0 to {site.in_features - 1}")

    def init(self, site, op):
        if self.init_text is None and self.init_ids is None:
            if self.start == "normal":
                return {"tokens": site.normal(self.num_tokens, site.out_features)}
            rows = site.uniform(self.num_tokens, bound=0.5).add(0.5).mul(site.in_features).long()
            rows = rows.clamp(max=site.in_features - 1)
        else:
            ids = list(self.init_ids) if self.init_ids is not None else op.token_ids(self.init_text)
            if not ids:
                raise ValueError(f"init_text={self.init_text!r} has no tokens to start from")
            rows = torch.tensor((ids * self.num_tokens)[: self.num_tokens], device=site.device)
        return {"tokens": op.weight().mT[rows].clone()}

    def forward(self, c, x, op):
        return op.prepend(op(x), c["tokens"])
