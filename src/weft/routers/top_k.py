"""A linear router: every token chooses some of the experts, or all by degrees."""

from dataclasses import dataclass, replace

import torch

from weft.core import option
from weft.core.apart import contrast, mix_by_roots
from weft.core.router import Router


@dataclass(frozen=True)
class TopK(Router):
    """y = W x + sum_k g_k(x) (f_k(x) - W x),  g = softmax(G x) over the `k` largest, or over all.

    Losses of its own: K sum_k F_k P_k, F the shares of the tokens that choose expert k first and P its mean probability
    (Fedus et al. 2021, arXiv 2101.03961), mean (log sum exp G x)^2 (Zoph et al. 2022, arXiv 2202.08906), and a contrast
    of what experts add, each with itself against the others (Luo et al. 2024, MoELoRA, arXiv 2402.12851).

    Li et al. 2024 (MixLoRA), arXiv 2404.15159; one expert per token: Chen et al. 2024 (LLaVA-MoLE), arXiv 2401.16160;
    all of them: Zadouri et al. 2023 (MoV, MoLORA), arXiv 2309.05444. Fewer experts in lower layers (Gao et al. 2024,
    MoLA, arXiv 2402.08562) are targets that say their own `experts`. Roots of gates: Sun et al. 2025, arXiv 2502.15828.
    """

    name = "top_k"
    paper = "2404.15159"
    k: int | None = option(2, help="experts that a token uses; null: all of them", minimum=1)
    normalise: bool = option(True, help="let the gates of the chosen sum to 1, not those of all")
    balance: float = option(0.01, help="weight of the loss that balances their load", minimum=0)
    z_loss: float = option(0.0, help="weight of the loss that keeps the router's scores small", minimum=0)
    contrast: float = option(0.0, help="weight of the loss that keeps experts apart (MoELoRA)", minimum=0)
    temperature: float = option(0.1, help="of that contrast", above=0)
    root_gates: bool = option(False, help="weigh experts' gradients by roots of gates, for scaled-adamw (and -sgd)")

    def check_experts(self):
        super().check_experts()
        if self.k is not None and self.k > len(self.experts):
            raise ValueError(f"top_k.k={self.k} is more than its {len(self.experts)} experts")

    def over(self, some):
        return replace(self, experts=some, k=None if self.k is None else min(self.k, len(some)))

    def own(self, site, op, made):
        return {"G": site.normal(len(self.experts), site.in_features, std=0.02)}

    def route(self, t, x, op):
        score = op.project(x, t["G"])  # [..., K]
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        probability = score.softmax(-1)
        gates = probability
        if self.k is not None:
            least = probability.topk(self.k).values[..., -1:]
            gates = torch.where(probability < least, 0.0, probability)
            gates = gates / gates.sum(-1, keepdim=True) if self.normalise else gates
        learns = (self.contrast or self.root_gates) and op.chance(0) is not None
        y = mix_by_roots(op, x, gates) if self.root_gates and learns else op.mix(x, gates)
        if self.balance and self.k is not None:
            first = torch.nn.functional.one_hot(probability.argmax(-1), len(self.experts)).flatten(0, -2)
            load = (first.to(score.dtype).mean(0) * probability.flatten(0, -2).mean(0)).sum()
            y = op.penalise(y, self.balance * len(self.experts) * load)
        if self.contrast and learns:
            y = op.penalise(y, self.contrast * contrast(op, x, gates, self.temperature))
        return op.penalise(y, self.z_loss * score.logsumexp(-1).square().mean()) if self.z_loss else y
