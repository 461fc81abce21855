"""AdapterDrop: bottleneck adapters that are trained to do without those of the first layers."""

from dataclasses import dataclass

import torch

from weft.core import Frozen, Method, option
from weft.core.two_layers import Activation, Placement, start, through, width_of


@dataclass(frozen=True)
class AdapterDrop(Method):
    """h = y + s k (U f(D z + d) + u),  z = y or x,  y = W x, or a block of x;  k = 1, but in training 0 in the first n
    layers, n drawn for every step from 0 to `most`.

    What is trained so can be cut: attach it again with layers="n-..." and its first layers cost nothing. The last
    layer is never left out: of 12 layers n is 0 to 11, each equally often.

    Rücklé et al. 2020, arXiv 2010.11918.
    """

    name = "adapter_drop"
    paper = "2010.11918"
    kinds = frozenset({"linear", "block"})
    default_targets = "mlp-blocks"
    most: int = option(11, help="of how many first layers a step may leave the adapters out", minimum=0)
    placement: Placement = option("sequential", help="read the map's result, or its input")
    width: int | None = option(None, help="size of the bottleneck, instead of reduction_factor", minimum=1)
    reduction_factor: float = option(16.0, help="what the number of channels it reads is divided by", minimum=1)
    activation: Activation = option("relu", help="f")
    scale: float = option(1.0, help="s")

    def init(self, site, op):
        t = start(site, self.placement, width_of(site, self.placement, self.width, self.reduction_factor))
        return {**t, "k": Frozen(site.ones(1))}

    def forward(self, c, x, op):
        y = op(x)
        change = self.scale * through(op, y if self.placement == "sequential" else x, c, self.activation)
        return y + (change if op.chance() is None else op.scale(change, c["k"]))

    def evolve(self, parts, progress):
        most = min(self.most, max((part.site.layer or 0 for part in parts), default=0))
        first = int(torch.randint(most + 1, (), generator=torch.Generator().manual_seed(progress.step)))
        for part in parts:
            part.tensors["k"].fill_(progress.step == progress.num_steps or (part.site.layer or 0) >= first)
