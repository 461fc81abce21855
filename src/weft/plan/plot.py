"""The plot of a forecast: memory by what it is for, and the learning rate over the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from weft.plan.forecast import NAMES, Forecast
from weft.plan.memory import Memory

__all__ = ["plot"]

_MEBIBYTE = 2**20


def plot(path: Path, forecasts: Mapping[str, Forecast], rates: Sequence[float]) -> Path:
    """Draw one bar for each forecast, and the curve of learning rates; the suffix of the file chooses the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.2 + 0.35 * len(forecasts)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1 + 0.3 * len(forecasts), 1.6))
    names = list(forecasts)
    start = [0.0] * len(names)
    for part in fields(Memory):
        sizes = [getattr(forecasts[n].memory, part.name) * forecasts[n].correction.memory / _MEBIBYTE for n in names]
        above.barh(names, sizes, left=start, label=NAMES[part.name])
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    above.invert_yaxis()
    above.set_xlabel("MiB at the peak")
    above.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    below.plot(range(1, len(rates) + 1), rates, lw=1.6)
    below.set_xlabel("step")
    below.set_ylabel("learning rate")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path
