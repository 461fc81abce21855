"""Super-Tuning: train the largest entries of the weight, and beside them a LoRA if wanted."""

import math
from dataclasses import dataclass
from typing import Literal

from weft.core import Frozen, Method, option
from weft.core.entries import added, entries, largest
from weft.core.starts import check_start, low_rank


@dataclass(frozen=True)
class SuperTuning(Method):
    """y = W x + S x,  S zero but at (1 - sparsity) of W's entries;  with a rank (Supra) + alpha / rank B A drop(x).

    The entries are those of largest |W|, or with `wanda` of largest |W_ij| |x_j| over data. arXiv 2607.09287.
    """

    name = "supertuning"
    paper = "2607.09287"
    pairs = (("A", "B"),)
    sparsity: float = option(0.99, help="share of the weight's entries that stay as they are", minimum=0, maximum=1)
    score: Literal["magnitude", "wanda"] = option("magnitude", help="what the entries are compared by")
    largest: bool = option(True, help="train the largest entries; false: the smallest")
    rank: int | None = option(None, help="inner size of a LoRA beside them (Supra); null: none", minimum=1)
    alpha: float | None = option(None, help="the LoRA's scale numerator; null: twice its rank", above=0)
    dropout: float = option(0.0, help="dropout on the LoRA's input", minimum=0, maximum=1)

    def needs(self):
        return frozenset({"covariance"} if self.score == "wanda" else ())

    def check(self, site):
        if self.score == "wanda" and site.kind != "linear":
            raise ValueError(f"score='wanda' reads a linear layer's inputs, and this is of kind {site.kind}")
        if self.count(site) < 1:
            raise ValueError(f"sparsity={self.sparsity} leaves none of its {math.prod(site.shape)} entries to train")
        check_start("kaiming", site, rank=self.rank or site.groups)

    def count(self, site) -> int:
        """How many entries train at a site."""
        return int(math.prod(site.shape) * (1 - self.sparsity))

    def init(self, site, op):
        score = op.weight().abs() * (op.covariance().diagonal().sqrt() if self.score == "wanda" else 1)
        places = largest(score if self.largest else -score, self.count(site))
        t = {"values": site.zeros(len(places)), "places": Frozen(places)}
        if self.rank is not None:
            t["A"], t["B"] = low_rank("kaiming", site, op, rank=self.rank, scale=self._scale())
        return t

    def coefficients(self, t, op):
        c = {} if self.rank is None else {"A": t["A"], "B": self._scale() * t["B"]}
        return c | entries(t["values"], t["places"], op.site.shape)

    def forward(self, c, x, op):
        y = added(c, x, op)
        return y if self.rank is None else op.expand(op.project(op.drop(x, self.dropout), c["A"]), c["B"], onto=y)

    def _scale(self):
        return 2.0 if self.alpha is None or self.rank is None else self.alpha / self.rank
