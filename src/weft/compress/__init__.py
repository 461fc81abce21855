"""Ways to make adapters smaller: one file, one way. They see tensors and plans, never models or files."""

from weft.compress.code import Code
from weft.compress.compeft import ALPHAS, Ternary, ternary
from weft.compress.extract import low_rank_change
from weft.compress.half import Half, half
from weft.compress.joint import Joint, joint_basis
from weft.compress.layout import expanded, packed
from weft.compress.one_bit import Gaussian, few_bits, through
from weft.compress.principal import Principal, principal_basis, principal_tensors

__all__ = [
    "ALPHAS", "Code", "Gaussian", "Half", "Joint", "Principal", "Ternary", "expanded", "few_bits", "half",
    "joint_basis", "low_rank_change", "packed", "principal_basis", "principal_tensors", "ternary", "through",
]  # fmt: skip
