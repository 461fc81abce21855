"""Write the tables of README.md and docs/ that come from the code; `--check` says whether they are current.

    python -m scripts.docs_tables [--check]

A table stands between `<!-- generated: NAME -->` and `<!-- end -->`; what is around it is written by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import ladder, methods_table
from weft.capabilities import Capabilities, capabilities, in_short
from weft.combine import rules
from weft.interop.peft import FAMILIES
from weft.optim import Pair, Setting, Trained, choices, state_bytes
from weft.recipe import docs_table
from weft.registry import methods
from weft.tune.schedules import schedules

ROOT = Path(__file__).resolve().parent.parent
_PLACE = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?\n?(<!-- end -->)", re.DOTALL)


def built_in() -> list[Capabilities]:
    """Weft's own methods: what happens to be installed beside it is not in its documentation."""
    return [capabilities(cls) for cls in methods().values() if cls.__module__.startswith("weft.methods.")]


def method_catalogue() -> str:
    """Every method in full: a table of what it can do, and its options."""
    parts = []
    for each in built_in():
        parts += [f"### `{each.name}`: {each.class_name}", "", each.summary[:1].upper() + each.summary[1:], ""]
        parts += ["```text", each.equation, "```", "", each.source, ""]
        parts += ["| adapts | by default | merges | rows in one batch |", "| --- | --- | --- | --- |"]
        cells = (", ".join(each.kinds), f"`{each.default_targets}`", _answers(each.merges), in_short(each.rows))
        parts += [_row(cells), ""]
        if each.options:
            parts += ["| option | value | default | meaning |", "| --- | --- | --- | --- |"]
        for option in each.options:
            value = option.type + (f", {option.limits}" if option.limits else "")
            parts.append(_row((f"`{option.name}`", value, f"`{option.default}`", option.help)))
        parts += [""] * bool(each.options)
    return "\n".join(parts).rstrip("\n") + "\n"


def method_table() -> str:
    """Every method on one line."""
    head = "| method | what it is | adapts | merges | rows in one batch | paper |"
    lines = [head, "| --- | --- | --- | --- | --- | --- |"]
    for each in built_in():
        paper = f"[{each.paper}](https://arxiv.org/abs/{each.paper})" if each.paper else ""
        able = ", ".join(each.kinds), in_short(each.merges), in_short(each.rows)
        cells = (f"`{each.name}`", each.summary.rstrip("."), *able, paper)
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def optimizer_table() -> str:
    """Every optimiser on one line, with what it keeps for each parameter of a large matrix in float32."""
    matrix = nn.Parameter(torch.empty(1024, 1024, device="meta"))
    trained = [Trained("layer.weight", matrix, layer=0)]
    setting = Setting(trained, pairs=[Pair(matrix, nn.Parameter(torch.empty(1024, 1024, device="meta")))])
    lines = ["| optimizer | what it is | from | bytes | options | paper |", "| --- | --- | --- | --- | --- | --- |"]
    for name, load in choices().items():
        cls = load()
        chosen = cls(**({"layers": 1} if name == "lisa" else {}))
        held = state_bytes(chosen, [{"params": [matrix], "weight_decay": 0.0}], setting) / matrix.numel()
        options = ", ".join(f"`{f.name}` {_value(f.default)}" for f in dataclasses.fields(cls))
        lines.append(_row((f"`{name}`", cls.what, cls.source, f"{held:.2g}", options, _paper(cls.paper))))
    return "\n".join(lines) + "\n"


def schedule_table() -> str:
    """Every schedule with its options."""
    lines = ["| schedule | what it is | options | paper |", "| --- | --- | --- | --- |"]
    for name, cls in schedules().items():
        options = "; ".join(f"`{f.name}` {_value(f.default)}: {f.metadata['help']}" for f in dataclasses.fields(cls))
        lines.append(_row((f"`{name}`", cls.what, options, _paper(cls.paper))))
    return "\n".join(lines) + "\n"


ABSENT = {
    "SHADOW": "none: before every layer it adds what a state says that the layer before has just changed, and a "
    "second decoder with positions and a cache of its own makes the first state; a body sees one layer. Nearest is "
    "`ladder_side`, which reads the layers and leaves them as they are",
    "XLORA": "`xlora`, a router: PEFT's folders of it are read, and not written",
}
"""HF PEFT's types that have no counterpart here, with the reason."""


def counterpart_table() -> str:
    """What every type of HF PEFT is called here, or why it is not there."""
    here: dict[str, list[str]] = {}
    for family in FAMILIES:
        here.setdefault(family.peft_type, []).append(f"`{family.method}`")
    rows = [_row((f"`{n}`", ", ".join(here.get(n, [ABSENT.get(n, "")])))) for n in sorted({*here, *ABSENT})]
    return "\n".join(["| HF PEFT | here |", "| --- | --- |", *rows]) + "\n"


def rule_table() -> str:
    """Every merging rule on one line."""
    lines = ["| rule | what it computes | base | options | paper |", "| --- | --- | --- | --- | --- |"]
    for name, cls in rules().items():
        equation = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        options = ", ".join(f"`{f.name}` {_value(f.default)}" for f in dataclasses.fields(cls)) or "-"
        needs = "needed" if cls.needs_base else "-"
        needs = f"{needs}; {cls.needs}" if cls.needs else needs
        lines.append(_row((f"`{name}`", f"`{equation}`", needs, options, _paper(cls.paper))))
    return "\n".join(lines) + "\n"


def router_table() -> str:
    """Every router on one line."""
    lines = ["| router | what it computes | adapts | options | paper |", "| --- | --- | --- | --- | --- |"]
    for name, cls in methods().items():
        if not cls.__module__.startswith("weft.routers."):
            continue
        equation = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        own = [f for f in dataclasses.fields(cls) if f.name not in ("experts", "train_experts")]
        options = "; ".join(f"`{f.name}` {_value(f.default)}: {f.metadata['help']}" for f in own) or "-"
        kinds = ", ".join(sorted(cls.kinds))
        lines.append(_row((f"`{name}`", f"`{equation}`", kinds, options, _paper(cls.paper))))
    return "\n".join(lines) + "\n"


def ladder_table() -> str:
    """What each lever does to a job's speed and memory, as `benchmarks/ladder.py` measured it last."""
    return ladder.table(json.loads((ROOT / "benchmarks" / "ladder.json").read_text()))


def results_table() -> str:
    """What every method learnt and cost, as `benchmarks/methods_table.py` measured it last."""
    return methods_table.table(_results())


def unmeasured() -> list[str]:
    """Methods that were not measured for that table."""
    return methods_table.missing(_results())


def _results() -> dict[str, Any]:
    path = methods_table.RESULTS
    return json.loads(path.read_text()) if path.is_file() else methods_table.NOTHING


def _value(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else "null" if default is None else str(default)


def _paper(number: str) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})" if number else ""


TABLES: dict[str, Callable[[], str]] = {
    "optimizers": optimizer_table,
    "schedules": schedule_table,
    "methods": method_table,
    "catalogue": method_catalogue,
    "recipe": docs_table,
    "ladder": ladder_table,
    "rules": rule_table,
    "routers": router_table,
    "counterparts": counterpart_table,
    "results": results_table,
}


def filled(text: str, where: str) -> str:
    """A page with its tables as the code gives them now."""

    def fill(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise SystemExit(f"{where}: there is no table {found[2]!r}; known: {', '.join(TABLES)}")
        return f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}"

    return _PLACE.sub(fill, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when a table is out of date")
    check = parser.parse_args().check
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        if not page.is_file():
            continue
        text = page.read_text(encoding="utf-8")
        new = filled(text, str(page.relative_to(ROOT)))
        if new != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'out of date; run make docs-table' if check else 'written'}")
    without = unmeasured()
    if without:
        print(f"docs/methods.md: no result of {', '.join(without)}; run python -m benchmarks.methods_table")
    return int(check and bool(stale or without))


def _answers(found: object) -> str:
    assert isinstance(found, dict)
    if set(found.values()) == {"yes"}:
        return "yes"
    return "; ".join(f"{kind}: {answer}" for kind, answer in found.items())


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
