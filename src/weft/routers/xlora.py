"""X-LoRA: what the base makes of a text decides, token by token, how much each expert counts."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from weft.core import Frozen, option
from weft.core.router import Router


@dataclass(frozen=True)
class XLoRA(Router):
    """y = W x + scale sum_k g_k (f_k(x) - W x),  g = softmax(M(z) / temperature),  z the base's last hidden state.

    The base runs first, without adapters, over all tokens; M, a map or a small network, is shared by all sites, which
    have the same gates, or scores of their own (`layerwise`).
    Buehler and Buehler 2024, arXiv 2402.07148.
    """

    name = "xlora"
    paper = "2402.07148"
    kinds = frozenset({"linear"})
    surveys = True
    softmax: Literal["all", "chosen", "none"] = option("all", help="over all experts, over the k chosen, or no softmax")
    temperature: float = option(1.0, help="of the softmax", above=0)
    k: int | None = option(None, help="experts that a token uses, others get 0; null: all", minimum=1)
    layerwise: bool = option(False, help="scores of its own for every site")
    depth: int = option(1, help="maps of the network, with relu between", minimum=1)
    width: int = option(2048, help="inner size of the network, where it has several maps", minimum=1)
    dropout: float = option(0.2, help="dropout behind every inner map of the network", minimum=0, maximum=1)
    hidden_size: int | None = option(None, help="of the base; null: what its first adapted map reads", minimum=1)
    scale: float = option(1.0, help="of what all experts add", above=0)

    def check_experts(self):
        super().check_experts()
        if self.softmax == "chosen" and self.k is None:
            raise ValueError("xlora.softmax='chosen' wants k, how many experts are chosen")
        if self.k is not None and self.k > len(self.experts):
            raise ValueError(f"xlora.k={self.k} is more than its {len(self.experts)} experts")

    def own_shared(self, sites):
        first, made = sites[0], {}
        sizes = [self.hidden_size or first.in_features, *[self.width] * (self.depth - 1)]
        rows = len(sites) if self.layerwise else 1
        maps = {f"M_{i}": sizes[i + 1] for i in range(self.depth - 1)}
        for key, size in {**maps, **{f"W_{e.name}": rows for e in self.experts}}.items():
            read = sizes[int(key[2:])] if key in maps else sizes[-1]
            made[key] = first.uniform(size, read, bound=read**-0.5, salt=key)
            made[f"b{key}"] = first.uniform(size, bound=read**-0.5, salt=key)
        return made

    def own_row(self, index):
        """Which row of the scores a site reads, where every site has one."""
        return {"row": torch.full((), index, dtype=torch.int32)} if self.layerwise else {}

    def own(self, site, op, made):
        return {key: Frozen(row.to(site.device)) for key, row in self.own_row(site.index).items()}

    def route(self, t, x, op):
        z = op.hidden()[-1]
        z = z.flatten(0, 1) if x.ndim == 2 else z  # [..., C]
        first = t["M_0" if self.depth > 1 else f"W_{op.names[0]}"]
        if z.shape[:-1] != x.shape[:-1] or z.shape[-1] != first.shape[1]:
            raise ValueError(
                f"{op.site.address} reads {[*x.shape]}, and xlora scores with {[*first.shape]} the hidden states "
                f"{[*z.shape]}: it wants the same tokens, and a hidden_size of {z.shape[-1]}"
            )
        z = z.to(first.dtype)
        for i in range(self.depth - 1):
            z = op.drop(F.linear(z, t[f"M_{i}"], t[f"bM_{i}"]).relu(), self.dropout)
        every = [key for key in t if key.startswith("W_")]
        row = t["row"].view(1) if self.layerwise else torch.zeros(1, dtype=torch.int32, device=z.device)
        of = {key: t[key].index_select(0, row) for w in every for key in (w, f"b{w}")}
        score = F.linear(z, torch.cat([of[w] for w in every]), torch.cat([of[f"b{w}"] for w in every]))
        gates = self._gates(score)[..., [every.index(f"W_{name}") for name in op.names]]
        return op.mix(x, self.scale * gates)

    def _gates(self, score):
        gates = (score / self.temperature).softmax(-1) if self.softmax == "all" else score
        if self.k is None:
            return gates
        chosen = gates >= gates.topk(min(self.k, gates.shape[-1])).values[..., -1:]
        if self.softmax == "chosen":
            return (gates / self.temperature).masked_fill(~chosen, -torch.inf).softmax(-1)
        return gates * chosen
