"""The core: verbs, the protocol of a method, sites, adapters, routes and their readings. Imports torch only."""

from weft.core.adapter import Adapter
from weft.core.affine import Affine, NotLinear, StartOp, WeightOp
from weft.core.evolve import Part, Progress
from weft.core.method import (
    LINEAR,
    Frozen,
    Method,
    Tensors,
    option,
)
from weft.core.op import Op
from weft.core.parts import Layers, Split
from weft.core.route import Rows, Stack, Weighted
from weft.core.site import Site

__all__ = [
    "LINEAR",
    "Adapter",
    "Affine",
    "Frozen",
    "Layers",
    "Method",
    "NotLinear",
    "Op",
    "Part",
    "Progress",
    "Rows",
    "Site",
    "Split",
    "Stack",
    "StartOp",
    "Tensors",
    "WeightOp",
    "Weighted",
    "option",
]
