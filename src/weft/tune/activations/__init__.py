"""What the forward keeps for the backward: counted, recomputed instead, and chosen layer by layer for a byte limit."""

from weft.tune.activations.budget import Chosen, Cost, choose, fit, measure_costs
from weft.tune.activations.kept import Kept, kept_bytes
from weft.tune.activations.layers import CHOICES, Choice, keep_activations, layers_of, set_activations

__all__ = [
    "CHOICES",
    "Choice",
    "Chosen",
    "Cost",
    "Kept",
    "choose",
    "fit",
    "keep_activations",
    "kept_bytes",
    "layers_of",
    "measure_costs",
    "set_activations",
]
