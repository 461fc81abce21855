"""Regularisers of training: one file each. They wrap how a step gets its gradient, or change gradients on their way."""

from weft.tune.regularise.allora import scale_rows
from weft.tune.regularise.coto import CoTo
from weft.tune.regularise.few_bits import FewBits
from weft.tune.regularise.gradient import Gradient
from weft.tune.regularise.mixout import Mixout

__all__ = ["CoTo", "FewBits", "Gradient", "Mixout", "scale_rows"]
