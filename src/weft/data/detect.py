"""Which format a set of rows has: from its columns, or as the recipe says; never a guess between two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from weft.data.read import read_rows
from weft.data.rows import BadRow, Row
from weft.errors import DataError, nearest

__all__ = ["FORMATS", "Format", "Layout", "detect", "detect_files"]

_PEEK_ROWS = 100


@dataclass(frozen=True)
class Format:
    """A known format: the parts that it must have, those that it may have, and the task that it is for."""

    needs: tuple[str, ...]
    allows: tuple[str, ...] = ()
    task: str = "causal-lm"


FORMATS: dict[str, Format] = {
    "prompt-completion": Format(("prompt", "completion")),
    "messages": Format(("messages",), ("tools",)),
    "alpaca": Format(("instruction", "output"), ("input", "system")),
    "sharegpt": Format(("conversations",), ("system", "tools")),
    "text": Format(("text",)),
    "text-label": Format(("text", "label"), task="classification"),
    "preference": Format(("chosen", "rejected"), ("prompt", "system", "tools"), task="preference"),
}


@dataclass(frozen=True)
class Layout:
    """A format, and the column in which each of its parts stands."""

    format: str
    columns: Mapping[str, str]


def detect_files(
    paths: str | Sequence[str],
    *,
    task: str = "causal-lm",
    format_name: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Layout:
    """The layout of the first rows of some files. Raises DataError when there is no readable row."""
    rows, bad = [], None
    for row in islice(read_rows(paths), _PEEK_ROWS):
        if isinstance(row, BadRow):
            bad = bad or row
        else:
            rows.append(row)
    if not rows:
        why = f"the first is bad ({bad.file}:{bad.line}: {bad.reason}: {bad.detail})" if bad else "they are empty"
        raise DataError(f"no readable row in the first {_PEEK_ROWS} of {paths}: {why}")
    return detect(rows, task=task, format_name=format_name, columns=columns)


def detect(
    rows: Sequence[Row],
    *,
    task: str = "causal-lm",
    format_name: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Layout:
    """The layout of `rows`. A column counts when half of the rows have it, so that one bad row decides nothing."""
    counts = Counter(key for row in rows for key in row.values)
    seen = {key for key, count in counts.items() if 2 * count >= len(rows)}
    given = dict(columns or {})
    _check_given(given, seen, format_name)
    parts = {part: part for part in seen} | given
    candidates = [format_name] if format_name else [name for name, kind in FORMATS.items() if kind.task == task]
    fitting = [name for name in candidates if set(FORMATS[name].needs) <= set(parts) and _uses(name, given)]
    if len(fitting) == 1:
        kind = FORMATS[fitting[0]]
        return Layout(fitting[0], {part: parts[part] for part in kind.needs + kind.allows if part in parts})
    raise DataError(_problem(seen, candidates, fitting, task=task, format_name=format_name, given=given))


def _uses(name: str, given: Mapping[str, str]) -> bool:
    return set(given) <= set(FORMATS[name].needs + FORMATS[name].allows)


def _check_given(given: Mapping[str, str], seen: set[str], format_name: str | None) -> None:
    if format_name is not None and format_name not in FORMATS:
        raise DataError(f"data.format: '{format_name}' is not a format; {nearest(format_name, FORMATS)}")
    kinds = [FORMATS[format_name]] if format_name else list(FORMATS.values())
    known = {part for kind in kinds for part in kind.needs + kind.allows}
    for part, column in given.items():
        if part not in known:
            raise DataError(
                f"data.columns: '{part}' is not a part of {format_name or 'any format'}; {nearest(part, known)}"
            )
        if column not in seen:
            raise DataError(f"data.columns: no column '{column}' for '{part}'; {nearest(column, seen)}")


def _problem(
    seen: set[str],
    candidates: list[str],
    fitting: list[str],
    *,
    task: str,
    format_name: str | None,
    given: Mapping[str, str],
) -> str:
    columns = ", ".join(sorted(seen)) or "none"
    if fitting:
        return (
            f"the columns {columns} fit more than one format ({', '.join(fitting)}): say which with data.format, for "
            f"example `format: {fitting[0]}`"
        )
    forms = "; ".join(f"{name} ({', '.join(FORMATS[name].needs)})" for name in candidates)
    renamed = f" with data.columns {dict(given)}" if given else ""
    asked = f"the format {format_name}" if format_name else f"any format for task {task}"
    return (
        f"the columns {columns}{renamed} do not fit {asked}; formats and the columns that they need: {forms}. Name the "
        f"columns with data.columns, for example `columns: {{prompt: question, completion: answer}}`"
    )
