"""LoRA: a low-rank update of the weight."""

from dataclasses import dataclass

import torch

from weft.core import Frozen, Method, option
from weft.core.starts import NEEDS, SUBTRACTED, Start, check_start, deal_ranks, low_rank


@dataclass(frozen=True)
class LoRA(Method):
    """y = W x + s (B A - B0 A0) drop(x),  s = alpha / R (alpha / sqrt(R) when rank-stabilised).

    A0 and B0 are frozen copies of A and B for starts whose B A is not zero (PiSSA, MiLoRA, OLoRA, CorDA, LoRA-GA,
    RiemannLoRA); others have none. With invocation_tokens, y = W x for all tokens before the last of these in a text.
    Hu et al. 2021, arXiv 2106.09685. Kalajdzievski 2023, 2312.03732. Activated: Greenewald et al. 2025, 2504.12397.
    """

    name = "lora"
    paper = "2106.09685"
    pairs = (("A", "B"),)
    looks_for = "invocation_tokens"
    rank: int = option(8, help="inner size of the update", minimum=1)
    alpha: float = option(16.0, help="scale numerator", above=0)
    rank_stabilised: bool = option(False, help="scale by alpha / sqrt(rank) instead of alpha / rank")
    dropout: float = option(0.0, help="dropout on the update's input", minimum=0, maximum=1)
    start: Start = option("kaiming", help="how A and B start; the last four repair a quantised base")
    start_rounds: int = option(1, help="most rounds of loftq and lq-lora", minimum=1)
    rho: float = option(1.0, help="eva: sites share ranks by variance, at most rho * rank each", minimum=1)
    freeze_a: bool = option(False, help="train B only")
    invocation_tokens: tuple[int, ...] = option((), help="token ids from whose last place on it changes a text, if any")

    @property
    def scale(self) -> float:
        """s of the equation."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def check(self, site):
        check_start(self.start, site, rank=self.rank, freeze_a=self.freeze_a, rho=self.rho)

    def needs(self):
        return NEEDS.get(self.start, frozenset())

    def deal(self, sites, ops):
        return deal_ranks(self, ops)

    def init(self, site, op):
        a, b = low_rank(self.start, site, op, rank=self.rank, scale=self.scale, rounds=self.start_rounds)
        t = {"A": Frozen(a) if self.freeze_a else a, "B": b}
        return t if self.start not in SUBTRACTED else t | {"A0": Frozen(a.clone()), "B0": Frozen(b.clone())}

    def coefficients(self, t, op):
        two = "A0" in t  # of twice the rank
        a, b = (torch.cat([t["A"], t["A0"]]), torch.cat([t["B"], -t["B0"]], 1)) if two else (t["A"], t["B"])
        return {"A": a, "B": self.scale * b}

    def forward(self, c, x, op):
        h = op.project(op.drop(x, self.dropout), c["A"])
        return op.expand(h * op.invoked(x, self.invocation_tokens) if self.invocation_tokens else h, c["B"], onto=op(x))
