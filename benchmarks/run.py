"""Run every benchmark (or those named), write the JSON beside it and the table in docs/benchmarks.md."""

from __future__ import annotations

import json
import platform
import sys
from datetime import date
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.common import Claim

HERE = Path(__file__).parent
NAMES = (
    "import_time",
    "attach_time",
    "many_adapters",
    "one_token",
    "mixed_batch",
    "train_step",
    "train_memory",
    "ladder",
    "whole_job",
    "zeroth_order",
    "packing",
    "many_training",
    "forecast",
    "merging",
    "compression",
    "combining",
)
PACKAGES = ("torch", "transformers", "peft")


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    kept = _kept()
    for name in names or NAMES:
        module = import_module(f"benchmarks.{name}")
        print(f"{name}: {module.__doc__}", flush=True)
        claims = module.run()
        for c in claims:
            print(f"  {_line(c)}", flush=True)
        kept["results"][name] = {"claim": module.__doc__, "rows": [c.as_dict() for c in claims]}
        kept |= {"date": date.today().isoformat(), "machine": _machine()}
        (HERE / "results.json").write_text(json.dumps(kept, indent=2) + "\n")  # now: the next one may be interrupted
        (HERE.parent / "docs" / "benchmarks.md").write_text(_page(kept))


def _kept() -> dict:
    file = HERE / "results.json"
    return json.loads(file.read_text()) if file.exists() else {"results": {}}


def _line(c: Claim) -> str:
    verdict = "holds" if c.holds else "MISSED"
    return f"{c.name}: {c.ratio:.3f} [{c.low:.3f}, {c.high:.3f}], at most {c.target:g}: {verdict} ({c.detail})"


def _machine() -> str:
    versions = ", ".join(f"{p} {version(p)}" for p in PACKAGES)
    return f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"


def _page(kept: dict) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`. Both sides run in one process, in turn; a figure is the median of the paired ratios",
        "ours / theirs, with quartiles. A missed target is printed as it is. Absolute times mean little on a shared",
        "machine.",
        "",
        f"{kept['machine']}; {kept['date']}.",
        "",
    ]
    for result in kept["results"].values():
        lines += [f"## {result['claim'].strip()}", ""]
        lines += ["| what | ratio | quartiles | target | |", "| --- | --- | --- | --- | --- |"]
        for row in result["rows"]:
            verdict = "holds" if row["holds"] else "**missed**"
            quartiles = f"{row['low']:.3f} to {row['high']:.3f}"
            what = f"{row['name']} ({row['detail']})"
            lines.append(f"| {what} | {row['ratio']:.3f} | {quartiles} | {row['target']:g} | {verdict} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
