"""A routed mixture of LoRAs: a router weighs several low-rank updates for every token."""

from dataclasses import dataclass

from weft.core import Method, option


@dataclass(frozen=True)
class Mixture(Method):
    """y = W x + (alpha / R) sum_e g_e(x) B_e A_e x,  g = softmax(G x), over the `top_k` largest only where that is set.

    The E updates are stacked to one of rank E R, so all are computed and the router weighs them; there is no loss that
    balances their load.

    Li et al. 2024 (MixLoRA), arXiv 2404.15159; Liu et al. 2023 (MoELoRA), arXiv 2310.18339.
    """

    name = "mixture"
    paper = "2404.15159"
    pairs = (("A", "B"),)
    kinds = frozenset({"linear"})
    num_experts: int = option(4, help="number of low-rank updates (E)", minimum=1)
    rank: int = option(4, help="inner size of each update", minimum=1)
    alpha: float = option(8.0, help="scale numerator", above=0)
    top_k: int | None = option(None, help="updates that a token uses; all by default", minimum=1)
    dropout: float = option(0.0, help="dropout on the updates' input", minimum=0, maximum=1)

    def check(self, site):
        if self.top_k is not None and self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}")

    def stacks(self):
        return self.num_experts

    def init(self, site, op):
        size = self.num_experts * self.rank
        return {
            "A": site.uniform(size, site.in_features, bound=site.in_features**-0.5),
            "B": site.zeros(site.out_features, size),
            "G": site.normal(self.num_experts, site.in_features, std=0.02),
        }

    def coefficients(self, t, op):
        return {**t, "B": (self.alpha / self.rank) * t["B"]}

    def forward(self, c, x, op):
        score = op.project(x, c["G"])  # [..., E]
        if self.top_k is not None:
            score = score.masked_fill(score < score.topk(self.top_k).values[..., -1:], float("-inf"))
        gate = score.softmax(-1)
        h = op.project(op.drop(x, self.dropout), c["A"]).unflatten(-1, (self.num_experts, self.rank))  # [..., E, R]
        return op.expand((gate[..., None] * h).flatten(-2), c["B"], onto=op(x))
