"""Linear: the weighted mean of tensors; a uniform soup where the weights are equal, WiSE-FT between two."""

from dataclasses import dataclass

from weft.combine.rule import Rule, RuleError
from weft.core import option


@dataclass(frozen=True)
class Linear(Rule):
    """W = sum_k w_k W_k / sum_k w_k.

    Wortsman et al. 2022 (model soups), arXiv 2203.05482; between a base and one tuned model: Wortsman et al. 2021
    (WiSE-FT), arXiv 2109.01903; of models tuned on shards of the data: Biggs et al. 2024 (Diffusion Soup), arXiv
    2406.08431.
    """

    name = "linear"
    paper = "2203.05482"
    by_entry = True
    normalise: bool = option(True, help="divide by the sum of the weights")

    def factors(self, weights):
        total = sum(weights) if self.normalise else 1.0
        if total == 0:
            raise RuleError(f"linear: the weights {weights} add up to 0; set normalise to false to add without a mean")
        return tuple(w / total for w in weights)

    def combine(self, tensors, given):
        shares = self.factors(given.weights)
        merged = shares[0] * tensors[0]
        for share, tensor in zip(shares[1:], tensors[1:], strict=True):
            merged.add_(tensor, alpha=share)
        return merged
