"""Adapters made smaller, or turned into LoRA: at a loss that is stated, measured, and held or refused."""

from weft.compressing.lora import to_lora
from weft.compressing.measure import Roots, input_roots, lost, num_bytes
from weft.compressing.ranks import EXACT
from weft.compressing.shrink import WAYS, Shrunk, Way, shrink
from weft.compressing.together import SETS, SetWay, Together, compress_together

__all__ = [
    "EXACT", "SETS", "WAYS", "Roots", "SetWay", "Shrunk", "Together", "Way", "compress_together", "input_roots", "lost",
    "num_bytes", "shrink", "to_lora",
]  # fmt: skip
