"""The report: every row is counted once, places are given, and the run stops when it should."""

from __future__ import annotations

import json
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.data.lint import check, content_keys, lint
from weft.data.read import BROKEN_FILE
from weft.data.rows import IGNORED, BadRow, Example
from weft.errors import DataError


def example(*tokens: int, line: int = 1, note: str = "") -> Example:
    return Example(array("i", (0, *tokens)), array("i", (IGNORED, *tokens)), "f.jsonl", line, note)


def bad(reason: str, line: int = 1) -> BadRow:
    return BadRow("f.jsonl", line, reason, "why")


@given(kinds=st.lists(st.sampled_from(["good", "two", "empty", "wrong type"]), max_size=30))
def test_good_and_bad_are_all_rows(kinds: list[str]) -> None:
    items = {"good": (example(1),), "two": (example(1), example(2))}
    examples, report = lint([items.get(kind) or bad(kind) for kind in kinds])
    assert report.num_rows == len(kinds)
    assert report.num_good == sum(kind in items for kind in kinds)
    assert sum(finding.count for finding in report.bad) == report.num_bad == len(kinds) - report.num_good
    assert report.num_examples == len(examples) == kinds.count("good") + 2 * kinds.count("two")
    assert report.num_trained_tokens == len(examples)


def test_the_first_places_of_each_reason_are_named() -> None:
    _, report = lint([bad("empty", line) for line in range(1, 6)] + [bad("wrong type", 9), (example(1),)])
    assert [(finding.reason, finding.count) for finding in report.bad] == [("empty", 5), ("wrong type", 1)]
    assert report.bad[0].places == ("f.jsonl:1 (why)", "f.jsonl:2 (why)", "f.jsonl:3 (why)")
    text = report.as_text()
    assert "train: 1 of 7 rows good" in text
    assert "bad: empty x 5: f.jsonl:1 (why)" in text
    assert json.loads(json.dumps(report.as_dict()))["num_bad"] == 6


def test_warnings_do_not_make_a_row_bad() -> None:
    rows = [(example(1, 9, line=1),), (example(1, 9, line=2),), (example(2, 9, line=3),), (example(3, line=4),)]
    rows += [(example(4, line=5, note="truncated"),)]
    _, train = lint(rows[2:3])
    _, report = lint(rows, end_tokens=frozenset({9}), seen_in_train=frozenset())
    found = {finding.reason: finding.places for finding in report.warnings}
    assert report.num_bad == train.num_bad == 0
    assert found.pop("duplicate row") == ("f.jsonl:2 (same as f.jsonl:1)",)
    assert found.pop("truncated") == ("f.jsonl:5",)
    [(reason, places)] = found.items()
    assert reason.startswith("no end token trained")
    assert places == ("f.jsonl:4",)


def test_documents_with_the_same_beginning_are_not_duplicates() -> None:
    def document(end: int, line: int) -> tuple[Example, ...]:
        return (example(1, 2, line=line, note="split"), example(2, end, line=line, note="split"))

    examples, report = lint([document(3, 1), document(4, 2), document(3, 3)])
    [split, again] = sorted(report.warnings, key=lambda finding: -finding.count)
    assert (split.reason, split.count) == ("split", 3)
    assert again.places == ("f.jsonl:3 (same as f.jsonl:1)",)
    keys = content_keys(examples)
    assert len(keys) == 2
    _, other = lint([document(4, 1), document(5, 2)], seen_in_train=keys)
    assert [item.places for item in other.warnings if item.reason == "also in train"] == [("f.jsonl:1",)]


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ([], {}, "no row in the data"),
        ([bad("empty")], {"max_bad_share": 1.0}, "every row is bad"),
        ([bad("empty")] + [(example(1),)] * 9, {}, r"1 of 10 rows are bad \(10.0%\).*max_bad_share.*\(1.0%\)"),
        ([bad("over-long")] + [(example(1),)] * 9, {}, "data.too_long: truncate"),
        ([bad("over-long")] + [(example(1),)] * 999, {"too_long": "error"}, "data.too_long is error"),
        ([bad(BROKEN_FILE)] + [(example(1),)] * 999, {}, "unknown number of rows is missing"),
    ],
)
def test_the_run_stops(items: list, options: dict, message: str) -> None:
    _, report = lint(items)
    with pytest.raises(DataError, match=message):
        check(report, **{"max_bad_share": 0.01} | options)


def test_the_run_goes_on_at_the_allowed_share() -> None:
    check(lint([bad("empty")] + [(example(1),)] * 99)[1], max_bad_share=0.01)
