"""Norm tuning: train the gains and offsets of the norm layers."""

from dataclasses import dataclass

from weft.core import Method, option


@dataclass(frozen=True)
class NormTuning(Method):
    """y = g * x + o,  x the normalised values; g and o start as the layer's own.

    Zhao et al. 2023, arXiv 2312.11420.
    """

    name = "norm_tuning"
    paper = "2312.11420"
    kinds = frozenset({"norm"})
    default_targets = "norms"
    offset: bool = option(True, help="train the offset too, where the layer has one")

    def init(self, site, op):
        t = {"weight": op.weight().clone()}
        return {**t, "bias": op.bias().clone()} if self.offset and site.has_bias else t

    def coefficients(self, t, op):
        return {**t, "bias": op.bias()} if "bias" not in t and op.bias() is not None else t

    def forward(self, c, x, op):
        y = op.project(x, c["weight"])
        return op.shift(y, c["bias"]) if "bias" in c else y
