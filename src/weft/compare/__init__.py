"""Methods side by side: the same base, data, budget and seeds, equal sizes where wanted, and which gains are real."""

from weft.compare.comparison import compare
from weft.compare.figures import Comparison, Figures
from weft.compare.layers import ChosenLayers, choose_layers
from weft.compare.settings import Settings

__all__ = ["ChosenLayers", "Comparison", "Figures", "Settings", "choose_layers", "compare"]
