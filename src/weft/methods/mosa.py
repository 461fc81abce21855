"""MoSA: a bottleneck adapter cut into pieces, of which every step trains one; together they are the adapter."""

from dataclasses import dataclass
from typing import Literal

import torch

from weft.core import Frozen, Method, option
from weft.core.two_layers import Activation, Placement, start, through, width_of


@dataclass(frozen=True)
class MoSA(Method):
    """h = y + s (U_i f(D_j z + d) + u),  z = y or x,  y = W x, or a block of x;  U_i = m_i * U,  D_j = D, or else
    D_0 + m_j * (D - D_0), D_0 its start.

    The n masks of a matrix cover all entries once, and every step draws one; afterwards their means stand there, U / n
    and D_0 + (D - D_0) / n. Pieces share biases; the paper's have their own. consistency weighs the squared difference
    of what two draws make of z; in the paper, the KL divergence of two passes. Zhang et al. 2023, arXiv 2312.02923.
    """

    name = "mosa"
    paper = "2312.02923"
    kinds = frozenset({"linear", "block"})
    default_targets = "mlp-blocks"
    random = True
    pieces: int = option(4, help="how many parts the matrices are cut into", minimum=1, maximum=255)
    cut: Literal["up", "both"] = option("up", help="cut U alone, as the paper's runs do, or D too")
    consistency: float = option(0.0, help="weight of the difference of two draws in the loss", minimum=0)
    placement: Placement = option("parallel", help="read the map's result, or its input")
    width: int | None = option(None, help="size of the bottleneck, instead of reduction_factor", minimum=1)
    reduction_factor: float = option(16.0, help="what the number of channels it reads is divided by", minimum=1)
    activation: Activation = option("relu", help="f")
    scale: float = option(0.1, help="s")

    def init(self, site, op):
        t = start(site, self.placement, width_of(site, self.placement, self.width, self.reduction_factor))
        for name in ("up", "down") if self.cut == "both" else ("up",):  # equally many entries to each piece, at random
            order = site.uniform(t[name].numel(), bound=1.0, salt=name).argsort().argsort()
            t[f"{name}_piece"] = (order % self.pieces).to(torch.uint8).view(t[name].shape)
        return t | ({"down_start": Frozen(t["down"].clone())} if self.cut == "both" else {})

    def coefficients(self, t, op):
        draws, c, other = op.chance(4), dict(t), {}
        for i, name in enumerate(n for n in ("up", "down") if f"{n}_piece" in t):
            first, drawn = t.get(f"{name}_start", 0), [1 / self.pieces] * 2
            if draws is not None:
                drawn = [t[f"{name}_piece"] == (draws[j] * self.pieces).to(torch.uint8) for j in (i, i + 2)]
            c[name], other[f"{name}_other"] = (first + (t[name] - first) * part for part in drawn)
        return c if draws is None else c | other

    def forward(self, c, x, op):
        y = op(x)
        z = y if self.placement == "sequential" else x
        change = through(op, z, c, self.activation)
        if self.consistency and "up_other" in c:
            others = {n: c[f"{n}_other"] for n in ("up", "down") if f"{n}_other" in c}
            other = through(op, z, c | others, self.activation)
            change = op.penalise(change, self.consistency * (change - other).square().mean())
        return y + self.scale * change
