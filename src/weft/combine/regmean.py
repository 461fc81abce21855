"""RegMean: the map whose outputs are nearest to those of all models on their own data."""

from dataclasses import dataclass
from typing import Literal

import torch

from weft.combine.rule import Rule
from weft.core import option


@dataclass(frozen=True)
class RegMean(Rule):
    """W = (sum_k w_k W_k G_k) (sum_k w_k G_k)^-1,  G_k = mean x x^T over model k's inputs, off the diagonal times a.

    Tensors that are no matrix are averaged. through says what G_k is measured on: the inputs that model k itself makes,
    or those that merged layers below make (RegMean++: Nguyen et al. 2025, arXiv 2508.03121); what measures it reads it.
    Jin et al. 2022, arXiv 2212.09849.
    """

    name = "regmean"
    paper = "2212.09849"
    needs = "covariance"
    through: Literal["own", "merged"] = option("own", help="whose layers make the inputs that G is measured on")
    off_diagonal: float = option(0.9, help="factor on what is off the diagonal of G (a)", minimum=0, maximum=1)

    def combine(self, tensors, given):
        if tensors[0].ndim != 2:
            return sum(w * t for w, t in zip(given.weights, tensors, strict=True)) / sum(given.weights)
        grams = []
        for weight, g in zip(given.weights, given.statistics, strict=True):
            diagonal = g.diagonal().diag()
            grams.append(weight * (self.off_diagonal * (g - diagonal) + diagonal))
        total = sum(grams)
        wanted = sum(t @ g for t, g in zip(tensors, grams, strict=True))
        return torch.linalg.lstsq(total, wanted.mT, driver="gelsd").solution.mT  # inputs may not span all directions
