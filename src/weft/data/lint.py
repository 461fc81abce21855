"""What was found in a set of rows: how many are good, what is wrong with the rest and where, and whether to stop."""

from __future__ import annotations

import os.path
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import groupby
from typing import Any

from weft.data.read import BROKEN_FILE
from weft.data.render import OVER_LONG
from weft.data.rows import BadRow, Example
from weft.errors import DataError

__all__ = ["Finding", "LintReport", "check", "content_key", "content_keys", "lint"]

_NUM_PLACES = 3


@dataclass(frozen=True)
class Finding:
    """One kind of trouble: how often, and the first places."""

    reason: str
    count: int
    places: tuple[str, ...]


@dataclass(frozen=True)
class LintReport:
    """The report on one split. `num_rows` = `num_good` + `num_bad`; a split document is one good row, many examples."""

    split: str
    num_rows: int
    num_good: int
    num_examples: int
    num_tokens: int
    num_trained_tokens: int
    longest_tokens: int
    bad: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()

    @property
    def num_bad(self) -> int:
        """Rows that are left out."""
        return self.num_rows - self.num_good

    @property
    def bad_share(self) -> float:
        """Bad rows as a share of all rows; 0 when there are none at all."""
        return self.num_bad / self.num_rows if self.num_rows else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON log."""
        return asdict(self) | {"num_bad": self.num_bad, "bad_share": self.bad_share}

    def as_text(self) -> str:
        """A few lines for a terminal."""
        rows = f"{self.num_good} of {self.num_rows} rows good, {self.num_examples} examples"
        tokens = f"{self.num_tokens} tokens ({self.num_trained_tokens} trained), longest {self.longest_tokens}"
        lines = [f"{self.split}: {rows}, {tokens}"]
        for title, findings in (("bad", self.bad), ("warning", self.warnings)):
            lines += [f"  {title}: {item.reason} x {item.count}: {'; '.join(item.places)}" for item in findings]
        return "\n".join(lines)


@dataclass
class _Tally:
    """Counts by reason, with the first places of each."""

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        first = self.places.setdefault(reason, [])
        if len(first) < _NUM_PLACES:
            first.append(place)

    def findings(self) -> tuple[Finding, ...]:
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return tuple(Finding(reason, count, tuple(self.places[reason])) for reason, count in ordered)


def lint(
    rendered: Iterable[tuple[Example, ...] | BadRow],
    *,
    split: str = "train",
    end_tokens: frozenset[int] = frozenset(),
    seen_in_train: frozenset[bytes] = frozenset(),
) -> tuple[tuple[Example, ...], LintReport]:
    """The good examples and the report. Every item of `rendered` is one row and is counted once.

    `end_tokens` turns on the warning about rows that never learn to stop; `seen_in_train` that about leaked rows.
    """
    examples: list[Example] = []
    bad, warnings = _Tally(), _Tally()
    first_place: dict[bytes, str] = {}
    num_rows = num_good = 0
    for item in rendered:
        num_rows += 1
        if isinstance(item, BadRow):
            bad.add(item.reason, f"{_place(item)} ({item.detail})" if item.detail else _place(item))
            continue
        num_good += 1
        examples += item
        place, key = _place(item[0]), content_key(item)
        if key in first_place:
            warnings.add("duplicate row", f"{place} (same as {first_place[key]})")
        elif key in seen_in_train:
            warnings.add("also in train", place)
        first_place.setdefault(key, place)
        if item[0].note:
            warnings.add(item[0].note, place)
        if end_tokens and not _trains_end(item[-1], end_tokens):
            warnings.add("no end token trained: the model will not learn to stop", place)
    return tuple(examples), LintReport(
        split=split,
        num_rows=num_rows,
        num_good=num_good,
        num_examples=len(examples),
        num_tokens=sum(len(example.input_ids) for example in examples),
        num_trained_tokens=sum(example.num_trained_tokens for example in examples),
        longest_tokens=max((len(example.input_ids) for example in examples), default=0),
        bad=bad.findings(),
        warnings=warnings.findings(),
    )


def check(report: LintReport, *, max_bad_share: float, too_long: str | None = None) -> None:
    """Raise DataError, with the report, when nothing is good, a file breaks off, or too large a share is bad."""
    counts = {finding.reason: finding.count for finding in report.bad}
    if report.num_rows == 0:
        raise DataError(f"{report.split}: there is no row in the data")
    if BROKEN_FILE in counts:
        problem = "a file cannot be read to its end, so an unknown number of rows is missing; repair it or leave it out"
    elif too_long == "error" and counts.get(OVER_LONG):
        problem = (
            f"{counts[OVER_LONG]} rows are over-long and data.too_long is error; raise data.max_length or use truncate"
        )
    elif report.num_good == 0:
        problem = "every row is bad"
    elif report.bad_share > max_bad_share:
        problem = (
            f"{report.num_bad} of {report.num_rows} rows are bad ({report.bad_share:.1%}), more than "
            f"data.max_bad_share allows ({max_bad_share:.1%}); repair the rows or raise it"
        )
        if counts.get(OVER_LONG):
            problem += " (for over-long rows: raise data.max_length or set data.too_long: truncate)"
    else:
        return
    raise DataError(f"{problem}\n{report.as_text()}")


def content_key(row: Iterable[Example]) -> bytes:
    """A short fingerprint of the tokens and labels of one row; a split document counts as a whole."""
    digest = blake2b(digest_size=16)
    for example in row:
        labels = str(example.labels).encode() if isinstance(example.labels, int) else example.labels.tobytes()
        digest.update(example.input_ids.tobytes() + b"|" + labels + b"|")
    return digest.digest()


def content_keys(examples: Iterable[Example]) -> frozenset[bytes]:
    """The fingerprints of the rows that many examples, in the order of the files, come from."""
    rows = groupby(examples, key=lambda example: (example.file, example.line))
    return frozenset(content_key(row) for _, row in rows)


def _place(item: Example | BadRow) -> str:
    relative = os.path.relpath(item.file)
    return f"{item.file if relative.startswith('..') else relative}:{item.line}"


def _trains_end(example: Example, end_tokens: frozenset[int]) -> bool:
    # a cut-off example lacks its end on purpose; "truncated" is reported already
    return isinstance(example.labels, int) or example.note == "truncated" or not end_tokens.isdisjoint(example.labels)
