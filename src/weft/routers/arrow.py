"""Arrow: every token goes to the experts whose updates it is most aligned with; nothing is trained."""

from dataclasses import dataclass, replace

import torch

from weft.core import Frozen, NotLinear, option
from weft.core.router import Router
from weft.core.updates import direction, update


@dataclass(frozen=True)
class Arrow(Router):
    """y = W x + sum_k g_k(x) (f_k(x) - W x),  g = softmax(|V x| / temperature) over the `k` largest.

    V_k: the first right singular vector of expert k's update, the direction of inputs that it changes most. It is
    computed where adapters are put together, and saved: join again what was trained since. Fresh pairs have A's.
    Ostapenko et al. 2024, arXiv 2405.11157. Less the mean of the `general` ones, experts keep what is their own:
    Bagherifard et al. 2025 (GenKnowSub), ACL short 54; of updates, where PEFT takes the means of A and of B apart.
    """

    name = "arrow"
    paper = "2405.11157"
    kinds = frozenset({"linear"})
    k: int | None = option(3, help="experts that a token uses; null: all of them", minimum=1)
    temperature: float = option(1.0, help="of the softmax: the lower, the more the best expert counts", above=0)
    general: tuple[str, ...] = option((), help="experts that are no choice: their mean is taken off the others")

    def tasks(self):
        return [e.name for e in self.experts if e.name not in self.general]

    def check_experts(self):
        super().check_experts()
        names, tasks = [e.name for e in self.experts], self.tasks()
        if unknown := [n for n in self.general if n not in names]:
            raise ValueError(f"arrow.general={', '.join(unknown)}: its experts are {', '.join(names)}")
        if len(tasks) < (self.k or 1):
            raise ValueError(f"arrow.k={self.k} is more than the {len(tasks)} experts that are not general")

    def over(self, some):
        general = tuple(e.name for e in some if e.name in self.general)
        k = None if self.k is None else max(min(self.k, len(some) - len(general)), 1)
        return replace(self, experts=some, general=general, k=k)

    def own(self, site, op, made):
        shapes = [replace(site, device="meta")]  # what sites share is not made yet where all is fresh
        fresh = any(e.method.shared(shapes).keys() - made[e.name].keys() for e in self.experts if e.method.shares())
        if fresh or torch.device(site.device).type == "meta":
            return {"V": Frozen(site.zeros(len(self.tasks()), site.in_features))}
        try:
            found = {e.name: update(e.method, made[e.name], site, op) for e in self.experts}
        except NotLinear as error:
            raise ValueError(f"arrow: an expert has no update at {site.address} to point along: it {error}") from error
        mean = [(-b / len(self.general), a) for b, a in (found[n] for n in self.general)]
        return {"V": Frozen(torch.stack([direction([found[n], *mean]) for n in self.tasks()]))}

    def route(self, t, x, op):
        score = op.project(x, t["V"]).abs()  # [..., K]
        score = score.to(torch.promote_types(score.dtype, torch.float32)) / self.temperature
        if self.k is not None:
            score = score.masked_fill(score < score.topk(self.k).values[..., -1:], -torch.inf)
        gates = score.new_full((*score.shape[:-1], len(self.experts)), -1 / max(len(self.general), 1))
        chosen = torch.tensor([e.name not in self.general for e in self.experts], device=x.device)
        return op.mix(x, gates.masked_scatter(chosen, score.softmax(-1)))
