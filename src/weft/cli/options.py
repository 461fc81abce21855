"""Options that stand for keys of a recipe: their help, choices and defaults come from its schema, never typed twice."""

from __future__ import annotations

import json
import sys
from functools import cache
from typing import Any

import typer

from weft.errors import WeftError
from weft.recipe import all_keys, expected

__all__ = ["JSON", "default", "example", "key_option", "log", "print_json", "settings", "share", "table"]

JSON = typer.Option("--json", help="Print JSON.")


def key_option(key: str, *flags: str, help: str | None = None) -> Any:
    """The option for a recipe's key, as in `key_option("check.tolerance")`: `--tolerance` with the key's own words."""
    field = _field(key)
    words = help or f"{_first_upper(field.description or '')} ({expected(field)})."
    return typer.Option(*(flags or (f"--{key.rpartition('.')[2].replace('_', '-')}",)), help=words, show_default=False)


def default(key: str) -> Any:
    """What the recipe's key is when it is not given."""
    return _field(key).default


def example(*lines: str) -> str:
    """The end of a command's help."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def log(text: str) -> None:
    """Say something about the work; standard output stays data."""
    print(text, file=sys.stderr, flush=True)


def share(option: str, text: str | None) -> float | None:
    """A share of a whole as it is written on the command line: `0.5%` or `0.005`; WeftError for what is none."""
    if text is None:
        return None
    try:
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        found = -1.0
    if not 0 <= found < 1:
        raise WeftError(f"{option} {text}: expected a share from 0 up to 1, as in 0.5% or 0.005")
    return found


def settings(given: list[str]) -> dict[str, Any]:
    """KEY=VALUE options as they are written on the command line, values read as YAML; WeftError for what is none."""
    import yaml

    found: dict[str, Any] = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator:
            raise WeftError(f"--set {text}: expected KEY=VALUE, as in density=0.5")
        parsed = yaml.safe_load(value)
        found[key] = tuple(parsed) if isinstance(parsed, list) else parsed
    return found


def print_json(value: Any) -> None:
    """Data for programs."""
    print(json.dumps(value, indent=2))


def table(rows: list[tuple[str, ...]], *, right: tuple[int, ...] = ()) -> str:
    """Columns side by side, the first row their names; `right` are the columns of numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


@cache
def _field(key: str) -> Any:
    return dict(all_keys())[key]


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]
