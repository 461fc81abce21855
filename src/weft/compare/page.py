"""compare.html: the table, gains against what they cost, and how each rate was chosen; one file, no outside parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from weft.report.page import whole_page
from weft.report.page import write_page as write_html
from weft.report.plots import Spot, scatter
from weft.report.sections import card, html_table, machine_facts
from weft.units import readable_bytes

__all__ = ["render", "write_page"]

About = Mapping[str, Any]
Row = Mapping[str, Any]

_PLOTS = (  # key, name of the axis, what one is divided by, whether it is logarithmic
    ("parameters", "trained parameters", 1.0, True),
    ("memory_bytes", "memory of a step above the weights, MiB", 2.0**20, False),
    ("step_ratio", "time of a step, as a multiple of the frozen base's", 1.0, False),
)


def write_page(path: Path, about: About) -> Path:
    """Write the page of a comparison. about: what compare.json holds."""
    return write_html(path, render(about))


def render(about: About) -> str:
    """The whole page."""
    done = [row for row in about["rows"] if row["gain"] is not None]
    parts = [
        f'<p class="lead">{_lead(about)}</p>',
        _cards(about, done),
        _table_section(about),
        *(_plot(done, key, axis, unit, log) for key, axis, unit, log in _PLOTS),
        _forgetting_plot(done),
        _rates_section(about["rows"]),
        f"<section><h2>Machine</h2>{machine_facts(about['machine'])}</section>",
    ]
    return whole_page("Methods compared", parts)


def _lead(about: About) -> str:
    measured = about["measured_on"]
    state = "" if about["finished"] else " Not finished: this is what is known so far."
    return escape(
        f"{len(about['rows'])} on {about['base']}, {about['settings']['seeds']} seeds each, measured on "
        f"{measured['rows']:,} {measured['split']} rows, where the base has a loss of {about['base_loss']:.4f}.{state}"
    )


def _cards(about: About, done: Sequence[Row]) -> str:
    if not done:
        return ""
    best, smallest = done[0], min(done, key=lambda row: row["parameters"])
    alike = [row for row in done[1:] if row["verdict"] == "no real difference"]
    cheapest = min([best, *alike], key=lambda row: row["parameters"])
    cards = [
        card("largest gain", escape(best["name"]), f"{best['gain']['mean']:.4f} nats"),
        card("not really different from it", str(len(alike)), f"of {len(done) - 1} others"),
        card("smallest of these", escape(cheapest["name"]), f"{cheapest['parameters']:,} parameters"),
        card("smallest of all", escape(smallest["name"]), f"{smallest['parameters']:,} parameters"),
    ]
    failed = [row for row in about["rows"] if row["error"]]
    cards += [card("failed", str(len(failed)), "see below the table")] * bool(failed)
    return f'<div class="cards">{"".join(cards)}</div>'


def _table_section(about: About) -> str:
    head = [
        "method", "gain", "95 % interval", "against the best", "forgotten, bits/byte", "parameters", "step", "memory",
        "tokens/s", "rate",
    ]  # fmt: skip
    rows = [_cells(row) for row in about["rows"]]
    remarks = [f"{row['name']}: {row['error'] or row['note']}" for row in about["rows"] if row["error"] or row["note"]]
    notes = "".join(f'<p class="note">{escape(line)}</p>' for line in [*remarks, *about["said"]])
    return f"<section><h2>Gains</h2>{html_table(head, rows, numbers=range(1, len(head)))}{notes}</section>"


def _cells(row: Row) -> list[str]:
    name = escape(row["name"])
    if row["gain"] is None:
        return [name, '<span class="badge bad">failed</span>' if row["error"] else "not run", *[""] * 8]
    gain, forgotten, memory = row["gain"], row["forgetting"], row["memory_bytes"]
    tone = "good" if gain["low"] > 0 else "bad" if gain["high"] < 0 else ""
    return [
        name,
        f'<span class="{tone}">{gain["mean"]:.4f}</span>',
        f"{gain['low']:.4f} to {gain['high']:.4f}",
        escape(row["verdict"]),
        "" if forgotten is None else f"{forgotten['mean']:+.4f}",
        f"{row['parameters']:,}",
        "" if row["step_ratio"] is None else f"{row['step_ratio']:.2f}",
        "" if memory is None else readable_bytes(memory),
        f"{row['tokens_per_second']:,.0f}",
        f"{row['learning_rate']:.2g}",
    ]


def _plot(done: Sequence[Row], key: str, axis: str, unit: float, log: bool) -> str:
    spots = [_spot(row, row[key] / unit) for row in done if row[key]]
    if not spots:
        return ""
    svg = scatter(spots, label=f"gain against {axis}", x=axis, y="gain, nats per token", log=log)
    return f'<section><h2>Gain against {escape(axis)}</h2><div class="scroll">{svg}</div></section>'


def _forgetting_plot(done: Sequence[Row]) -> str:
    spots = [_spot(row, row["forgetting"]["mean"]) for row in done if row["forgetting"] is not None]
    if not spots:
        return ""
    axis = "forgotten, bits per byte of text that the base knows"
    svg = scatter(spots, label="gain against what was forgotten", x=axis, y="gain, nats per token")
    return f'<section><h2>Gain against what was forgotten</h2><div class="scroll">{svg}</div></section>'


def _spot(row: Row, x: float) -> Spot:
    gain = row["gain"]
    alike = row["verdict"] in ("the best", "no real difference")
    return Spot(row["name"], x, gain["mean"], gain["low"], gain["high"], first=alike)


def _rates_section(rows: Sequence[Row]) -> str:
    """Every trial of every search."""
    found = []
    for row in rows:
        for trial in row["trials"]:
            loss = "not a number" if trial["loss"] is None else f"{trial['loss']:.4f}"
            state = "ended early" if trial["ended_early"] else ""
            chosen = trial["rate"] == row["learning_rate"]
            rate = f"<b>{trial['rate']:.2g}</b>" if chosen else f"{trial['rate']:.2g}"
            found.append([escape(row["name"]), rate, loss, state])
    if not found:
        return ""
    table = html_table(["method", "rate", "loss", ""], found, numbers=(1, 2))
    return f"<section><h2>Learning rates</h2><details><summary>Every trial</summary>{table}</details></section>"
