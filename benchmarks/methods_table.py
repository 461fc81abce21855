"""Every method on one small task: what it learns, forgets and costs; the table in docs/methods.md is made of this.

    python -m benchmarks.methods_table [--methods lora,dora | --part 1/2] [--output FOLDER]

`weft compare` runs them all on pico, at their default options, with the learning rate the better of two. It may be
stopped and started again: what is done is in the folder, so a method that has changed needs another one. Rows of other
methods stay in benchmarks/methods.json as they are, so two cores may do a part each, one thread a part.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import weft
from weft.compare import Comparison, Settings
from weft.recipe import Recipe
from weft.registry import methods

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "methods.json"
MARGIN = 0.05
"""Nats per token of the test rows that a method must gain to have learnt; fixed before the first run."""

SETTINGS = Settings(seeds=1, steps=40, trials=2, rates=(1.0, 10.0), trial_share=1.0, rows=48, pairs=2)
"""A trial is as long as the run: what is ahead after a quarter of so few steps is often the rate that is too large."""

RATES: dict[str, tuple[float, ...]] = {
    "k_adapter": (0.1, 1.0),  # the authors' scripts have 3e-5 and 5e-5
    # a few numbers that stand for much need steps of their own size: rows of length 1 a channel before an attention,
    "prefix": (100.0, 500.0),
    "cartridge": (100.0, 500.0),
    "unilora": (25.0, 100.0),  # and one vector of 256 from within 0.02, entries of which are all that A and B have
}
"""Other rates for methods whose parameters are of another size, as multiples of the recipe's."""

CONTEXT = """def getpos(self):
    return self.lineno, self.offset
Return current line number and offset.
def system():

    return uname().system
Returns the system/OS name, e.g. 'Linux', 'Windows' or 'Java'.
@property
def imag(self):
    return 0
Real numbers have no imaginary component."""
"""Three rows of the training data, for a prompt that is made of examples."""

NEEDED: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 64},
    "compacter": {"division": 2},
    "cpt": {"init_text": CONTEXT, "num_tokens": 88},
    "flix": {"task": 0, "language": 0},
    "hyper_adapters": {"source": 0, "target": 0},
    "hyperformer": {"task": 0},
    "multitask_prompt": {"task": 0},
    "poly": {"task": 0},
    "prototype_adapters": {"task": 0},
    "trainable_tokens": {"token_ids": [*range(256)]},
    "vblora": {"vector_length": 64},
}
"""Options without which a method does not fit pico or this data: all others are at their defaults."""

NOTHING: dict[str, Any] = {"margin": MARGIN, "rows": {}}
"""Before anything was measured."""


def recipe() -> Recipe:
    """Source code -> the first line of its docstring, on short rows."""
    data = ROOT / "examples" / "data" / "docstrings"
    return Recipe.model_validate(
        {
            "base": {"model": "pico"},
            "data": {
                **{split: str(data / f"{split}.jsonl") for split in ("train", "validation", "test")},
                "max_length": 96,
                "max_bad_share": 1.0,
                "limit": 1500,
            },
            "train": {"batch_size": 8, "learning_rate": 2e-3, "warmup": 0.05, "threads": 1},
            "tied": "separate",  # the head of pico is its input embedding
            "forgetting": {"limit": 8},
        }
    )


def built_in() -> list[str]:
    """Weft's own methods: what happens to be installed beside it is not in its documentation."""
    return [name for name, cls in methods().items() if cls.__module__.startswith("weft.methods.")]


def measured(found: Comparison) -> dict[str, Any]:
    """What is kept of a comparison: a row for each method, and what they have in common."""
    kept = ("learning_rate", "gain", "forgetting", "parameters", "step_ratio", "memory_bytes", "note", "error")
    rows = {row["method"]["name"]: {key: row[key] for key in kept} for row in found.as_dict()["rows"]}
    about = {key: found.about[key] for key in ("base", "base_loss", "base_bits_per_byte", "measured_on", "machine")}
    return {"about": about, "margin": MARGIN, "rows": dict(sorted(rows.items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", help="names, as in lora,dora; all, if not given")
    parser.add_argument("--part", default="1/1", help="one of several parts, as in 1/2")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "methods-table")
    arguments = parser.parse_args()
    names = arguments.methods.split(",") if arguments.methods else built_in()
    part, parts = map(int, arguments.part.split("/"))
    names = names[part - 1 :: parts]
    for rates in dict.fromkeys(RATES.get(name, SETTINGS.rates) for name in names):
        chosen = [{"name": name, **NEEDED.get(name, {})} for name in names if RATES.get(name, SETTINGS.rates) == rates]
        folder = arguments.output / f"part-{part}-of-{parts}" / "-".join(map(str, rates))
        keep(measured(weft.compare(recipe(), chosen, output=folder, settings=replace(SETTINGS, rates=rates))))


def keep(found: dict[str, Any]) -> None:
    """Put rows among those that are there."""
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else {}
    rows = {name: row for name, row in {**kept, **found["rows"]}.items() if name in built_in()}
    RESULTS.write_text(json.dumps({**found, "rows": dict(sorted(rows.items()))}, indent=1) + "\n")
    print(f"{RESULTS}: {len(rows)} methods; now run make docs-table")


def table(found: dict[str, Any]) -> str:
    """The rows as Markdown, the largest gain first; methods that have none last."""
    lines = [
        "| method | gain, nats | learnt | forgotten, bits/byte | parameters | step | memory, MiB | rate |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = {name: found["rows"].get(name) for name in built_in()}
    for name, row in sorted(rows.items(), key=lambda item: -_gain(item[1])):
        lines.append(f"| {' | '.join([f'`{name}`', *_cells(row, found['margin'])])} |")
    return "\n".join(lines) + "\n"


def missing(found: dict[str, Any]) -> list[str]:
    """Methods that have no row."""
    return [name for name in built_in() if name not in found["rows"]]


def _gain(row: dict[str, Any] | None) -> float:
    return float("-inf") if row is None or row["gain"] is None else row["gain"]["mean"]


def _cells(row: dict[str, Any] | None, margin: float) -> list[str]:
    if row is None:
        return ["", "not measured", *[""] * 5]
    if row["gain"] is None:
        return ["", f"failed: {row['error']}".replace("|", "\\|"), *[""] * 5]
    forgotten, memory, ratio = row["forgetting"], row["memory_bytes"], row["step_ratio"]
    return [
        f"{row['gain']['mean']:.3f}",
        "yes" if row["gain"]["mean"] >= margin else "no",
        "" if forgotten is None else f"{forgotten['mean']:+.3f}",
        f"{row['parameters']:,}",
        "" if ratio is None else f"{ratio:.2f}",
        "" if memory is None else f"{memory / 2**20:.0f}",
        f"{row['learning_rate']:.2g}",
    ]


if __name__ == "__main__":
    main()
