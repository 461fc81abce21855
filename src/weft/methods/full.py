"""Full: a trained copy of the weight and bias, for heads and other modules that are learned whole."""

from dataclasses import dataclass

import torch

from weft.core import LINEAR, Method, option


@dataclass(frozen=True)
class Full(Method):
    """y = V x + v, with V and v starting as the frozen weight and bias.

    half: of every two matrices after one another, chance takes one, as half fine-tuning does (Hui et al. 2024, arXiv
    2404.18466); a next stage on the merged model takes others with another seed. A few layers alone are `layers=` of
    attaching; `weft.compare.choose_layers` finds them as SubTuning does (Kaplun et al. 2023, arXiv 2302.06354).
    """

    name = "full"
    copies = ("weight", "bias")
    kinds = LINEAR | {"norm"}
    bias_outside = True
    half: int | None = option(None, help="seed of the half of the sites that is trained; None: all are", minimum=0)

    def adapts(self, index, count):
        if self.half is None:
            return True
        pairs = torch.randint(2, (count // 2 + 1,), generator=torch.Generator().manual_seed(self.half), device="cpu")
        return int(pairs[index // 2]) == index % 2

    def init(self, site, op):
        bias = op.bias()
        t = {"weight": op.weight().clone()}
        return t if bias is None else {**t, "bias": bias.clone()}

    def coefficients(self, t, op):
        bias = op.bias()
        return t if bias is None else {"weight": t["weight"], "shift": t["bias"] - bias}

    def forward(self, c, x, op):
        y = op.project(x, c["weight"])
        return op.shift(y, c["shift"]) if "shift" in c else y
