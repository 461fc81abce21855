"""Full: a trained copy of the weight and bias, for heads and other modules that are learned whole."""

from dataclasses import dataclass

from weft.core import LINEAR, Method


@dataclass(frozen=True)
class Full(Method):
    """y = V x + v, with V and v starting as the frozen weight and bias."""

    name = "full"
    copies = ("weight", "bias")
    kinds = LINEAR | {"norm"}
    bias_outside = True

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
