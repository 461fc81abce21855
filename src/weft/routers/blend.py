"""A blend: every expert counts with a weight that is learnt and the same for all inputs."""

from dataclasses import dataclass

from weft.core import option
from weft.core.method import LINEAR
from weft.core.router import Router


@dataclass(frozen=True)
class Blend(Router):
    """y = W x + sum_k w_k (f_k(x) - W x),  w_k a number of each site, or one of each of its channels; not normalised.

    It is linear where its experts are, and merges with them.

    Zhang et al. 2024 (aTLAS: a number, from 0), arXiv 2407.02880; Frohmann et al. 2023 (ScaLearn: by channel, from
    2 / K, dropout of 0.3 on w; uniform: a number; ++: shared by all sites), arXiv 2310.01217; one vector for the whole
    model: Huang et al. 2023 (LoraHub), arXiv 2307.13269.
    """

    name = "blend"
    paper = "2407.02880"
    kinds = LINEAR | {"norm", "block"}
    by_channel: bool = option(False, help="a weight for every output channel")
    share_weights: bool = option(False, help="the same weights at all sites")
    start: float = option(1.0, help="what the weights sum to at the start; 0 is for experts that are trained already")
    dropout: float = option(0.0, help="dropout on the weights", minimum=0, maximum=1)

    def own(self, site, op, made):
        return {} if self.share_weights else self._weights(site)

    def own_shared(self, sites):
        if not self.share_weights:
            return {}
        widths = sorted({site.out_features for site in sites})
        if self.by_channel and len(widths) > 1:
            raise ValueError(f"share_weights with by_channel wants sites of one width, and these have {widths}")
        return self._weights(sites[0])

    def _weights(self, site):
        size = site.out_features if self.by_channel else 1
        return {f"w_{e.name}": site.ones(size) * (self.start / len(self.experts)) for e in self.experts}

    def route(self, t, x, op):
        return op.scaled(x, [op.drop(t[f"w_{name}"], self.dropout) for name in op.names])
