"""The plot of a router's choices: one row for every site, one column for every expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path

__all__ = ["plot_shares"]


def plot_shares(shares: Mapping[str, Mapping[str, float]], experts: Sequence[str], file: Path) -> Path:
    """Draw how much each expert counted at each site; the suffix of the file chooses the format."""
    from matplotlib.figure import Figure

    tall = 1.2 + 0.16 * len(shares)
    figure = Figure(figsize=(4.5 + 0.45 * len(experts), tall), layout="constrained")
    axes = figure.subplots()
    values = [[own.get(name, nan) for name in experts] for own in shares.values()]  # empty where an expert is not
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0.0)
    turned = max(map(len, experts)) > 3
    axes.set_xticks(range(len(experts)), experts, rotation=45 if turned else 0, ha="right" if turned else "center")
    axes.set_yticks(range(len(shares)), list(shares), fontsize=6)
    figure.colorbar(image, ax=axes, label="share of all experts")
    figure.savefig(file)
    return file
