"""What a comparison comes to: each row's means with intervals, its difference to the best, and the whole as JSON."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from weft.compare.entries import Entry
from weft.compare.settings import Settings
from weft.compare.shared import Shared
from weft.compare.statistics import Estimate, Losses, Weights, bootstrap_weights, difference, mean
from weft.tune.machine import describe_machine
from weft.units import readable_bytes

__all__ = ["COLUMNS", "Comparison", "Figures", "Known", "summarise"]

COLUMNS = (
    "method", "gain", "95 % interval", "against the best", "forgotten", "parameters", "step", "memory", "tokens/s",
    "rate",
)  # fmt: skip
NOTHING = "no real difference"


class Known(Protocol):
    """What is known of a row: see `weft.compare.comparison`."""

    entry: Entry
    match: dict[str, Any] | None
    search: dict[str, Any] | None
    facts: dict[str, Any]
    runs: dict[int, dict[str, Any]]
    error: str | None


@dataclass(frozen=True)
class Figures:
    """One row. Losses are in nats per trained token (row, pair), memory in bytes, forgetting in bits per byte.

    gain: the base's loss minus the adapted one. difference: this gain minus the best row's, over the seeds and
    examples that both have. step_ratio: a training step's time over that of the frozen base. memory_bytes: the highest
    point of a step above the weights, as `memory_by` says forecast or measured.
    """

    name: str
    method: Mapping[str, Any]
    learning_rate: float
    seeds: tuple[int, ...] = ()
    gain: Estimate | None = None
    difference: Estimate | None = None
    forgetting: Estimate | None = None
    parameters: int | None = None
    step_ratio: float | None = None
    memory_bytes: int | None = None
    memory_by: str | None = None
    tokens_per_second: float | None = None
    match: Mapping[str, Any] | None = None
    trials: Sequence[Mapping[str, Any]] = ()
    note: str = ""
    error: str | None = None

    @property
    def verdict(self) -> str:
        """What the difference to the best row says."""
        if self.gain is None:
            return ""
        if self.difference is None:
            return "the best"
        return NOTHING if self.difference.is_nothing else f"{self.difference.mean:+.4f}"

    def cells(self) -> tuple[str, ...]:
        """The row of a table with COLUMNS."""
        if self.gain is None:
            return (self.name, "failed" if self.error else "not run", *[""] * (len(COLUMNS) - 2))
        interval = f"{self.gain.low:.4f} to {self.gain.high:.4f}"
        optional = (
            "" if self.forgetting is None else f"{self.forgetting.mean:+.4f}",
            f"{self.parameters:,}",
            "" if self.step_ratio is None else f"{self.step_ratio:.2f}",
            "" if self.memory_bytes is None else readable_bytes(self.memory_bytes),
            f"{self.tokens_per_second:,.0f}",
            f"{self.learning_rate:.2g}",
        )
        return (self.name, f"{self.gain.mean:.4f}", interval, self.verdict, *optional)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {**dataclasses.asdict(self), "method": dict(self.method), "verdict": self.verdict}


@dataclass(frozen=True)
class Comparison:
    """All rows, the best first, and what they were measured on."""

    rows: tuple[Figures, ...]
    about: Mapping[str, Any]
    folder: Path

    @property
    def page(self) -> Path:
        """The report."""
        return self.folder / "compare.html"

    def table(self) -> list[tuple[str, ...]]:
        """The names of the columns, then the rows; columns in which nothing stands are left out."""
        whole = [COLUMNS, *(row.cells() for row in self.rows)]
        kept = [i for i in range(len(COLUMNS)) if any(row[i] for row in whole[1:])]
        return [tuple(row[i] for i in kept) for row in whole]

    def remarks(self) -> list[str]:
        """What stands below the table: errors, notes, and how to read it."""
        found = [f"{row.name}: {row.error or row.note}" for row in self.rows if row.error or row.note]
        return found + list(self.about["said"])

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {**self.about, "rows": [row.as_dict() for row in self.rows]}


def summarise(
    shared: Shared, settings: Settings, known: Sequence[Known], folder: Path, *, finished: bool
) -> Comparison:
    """The figures of all that was run."""
    rows = [_figures(shared, each) for each in known]
    done = [(row, each) for row, each in zip(rows, known, strict=True) if row.gain is not None]
    if done:
        best, of_best = max(done, key=lambda pair: (len(pair[0].seeds), pair[0].gain.mean if pair[0].gain else 0.0))
        rows = [
            row if row.gain is None or row is best
            else dataclasses.replace(row, difference=_against(shared, each, of_best))
            for row, each in zip(rows, known, strict=True)
        ]  # fmt: skip
    rows.sort(key=lambda row: (row.gain is None, row.difference is not None, -(row.gain.mean if row.gain else 0.0)))
    recipe = shared.session.recipe
    about = {
        "finished": finished,
        "base": recipe.base.model,
        "task": recipe.task,
        "settings": dataclasses.asdict(settings),
        "base_loss": shared.base_losses.mean,
        "base_bits_per_byte": _base_bits(shared),
        "measured_on": {"split": shared.measured_name, "rows": len(shared.measured)},
        "said": [*shared.said, *_said(settings)],
        "machine": describe_machine(shared.session.device),
    }
    return Comparison(tuple(rows), about, folder)


def _figures(shared: Shared, known: Known) -> Figures:
    recipe = known.entry.recipe
    rate = recipe.train.learning_rate if known.search is None else known.search["rate"]
    trials = () if known.search is None else tuple(known.search["trials"])
    plain = Figures(
        known.entry.name, recipe.method, rate, match=known.match, trials=trials, note=known.entry.note,
        error=known.error,
    )  # fmt: skip
    if not known.runs:
        return plain
    seeds, runs = tuple(sorted(known.runs)), [known.runs[seed] for seed in sorted(known.runs)]
    counts, weights = shared.base_losses.counts, _weights(shared, len(seeds))
    return dataclasses.replace(
        plain,
        seeds=seeds,
        gain=mean(_gains(shared, known, seeds), counts, weights),
        forgetting=_forgetting(shared, runs),
        parameters=runs[0]["parameters"],
        step_ratio=known.facts.get("step_ratio"),
        memory_bytes=known.facts.get("memory"),
        memory_by=known.facts.get("memory_by"),
        tokens_per_second=statistics.median(run["num_tokens"] / max(run["seconds"], 1e-9) for run in runs),
    )


def _gains(shared: Shared, known: Known, seeds: Sequence[int]) -> Losses:
    """[S, N] by seed and example."""
    return np.asarray(shared.base_losses.losses) - np.asarray([known.runs[seed]["losses"] for seed in seeds])


def _forgetting(shared: Shared, runs: Sequence[Mapping[str, Any]]) -> Estimate | None:
    base = shared.base_like_losses
    if base is None:
        return None
    changes = np.asarray([run["base_like_losses"] for run in runs]) - np.asarray(base.losses)
    weights = bootstrap_weights(len(runs), len(base.losses))
    return mean(changes / log(2), base.num_bytes, weights)


def _against(shared: Shared, known: Known, best: Known) -> Estimate:
    seeds = sorted(known.runs.keys() & best.runs.keys())
    one, other = _gains(shared, known, seeds), _gains(shared, best, seeds)
    return difference(one, other, shared.base_losses.counts, _weights(shared, len(seeds)))


def _weights(shared: Shared, num_seeds: int) -> Weights:
    return bootstrap_weights(num_seeds, len(shared.measured))


def _base_bits(shared: Shared) -> float | None:
    base = shared.base_like_losses
    return None if base is None else sum(base.losses) / log(2) / sum(base.num_bytes)


def _said(settings: Settings) -> list[str]:
    """How the figures came about, for a reader."""
    found = [
        f"gain: loss of the base minus that with the adapter, mean of {settings.seeds} seeds; intervals: 95 %, paired "
        "bootstrap over seeds and examples"
        if settings.seeds > 1
        else "gain: loss of the base minus that with the adapter, one seed; intervals: 95 %, bootstrap over examples "
        "alone, which says nothing about another seed"
    ]
    if settings.trials:
        found.append(
            f"rate: the best of {settings.trials} trials of {settings.trial_share:.0%} of the steps, by successive "
            "halving"
        )
    if settings.match:
        found.append(f"{settings.match}: equal to within {settings.allowed:.0%}, by each method's own option of size")
    return found
