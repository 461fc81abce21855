"""Readers: every format, every kind of damage, and nothing that disappears."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.data.read import BROKEN_FILE, list_files, read_rows
from weft.data.rows import BadRow, Row
from weft.errors import DataError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "ä\nsecond line", "completion": 'with "quotes", and comma'}]
FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, content: bytes | str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def values(path: str) -> list[dict]:
    rows = list(read_rows(path))
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.values for row in rows]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    lines = "\n".join(json.dumps(row) for row in ROWS)
    table = io.StringIO()
    writer = csv.DictWriter(table, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(ROWS)
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert values(write(tmp_path / "a.jsonl", lines)) == ROWS
    assert values(write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + lines.encode())) == ROWS
    assert values(write(tmp_path / "lines.json", lines)) == ROWS
    assert values(write(tmp_path / "array.json", json.dumps(ROWS, indent=1))) == ROWS
    assert values(write(tmp_path / "one.json", json.dumps(ROWS[0], indent=1))) == ROWS[:1]
    assert values(write(tmp_path / "a.csv", table.getvalue())) == ROWS
    assert values(write(tmp_path / "a.tsv", "prompt\tcompletion\na\tb\n")) == ROWS[:1]
    assert values(str(tmp_path / "a.parquet")) == ROWS
    assert values(write(tmp_path / "a.txt", "one\r\ndocument\n")) == [{"text": "one\ndocument\n"}]


def test_a_datasets_folder_is_read_and_class_indices_become_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    data.save_to_disk(str(tmp_path / "one"))
    assert [row["label"] for row in values(str(tmp_path / "one"))] == ["yes", "no", -1]
    datasets.DatasetDict(train=data, test=data).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match="holds the splits test, train"):
        list(read_rows(str(tmp_path / "both")))
    (tmp_path / "one" / "state.json").write_text("{}")
    [bad] = read_rows(str(tmp_path / "one"))
    assert isinstance(bad, BadRow)
    assert bad.reason == BROKEN_FILE


def test_places_are_the_lines_of_the_file(tmp_path: Path) -> None:
    array = write(tmp_path / "a.json", '[\n\n  {"a": 1},\n  {"a":\n 2}, 3,\n {"a": 4}\n]')
    assert [(row.line, type(row).__name__) for row in read_rows(array)] == [
        (3, "Row"),
        (4, "Row"),
        (5, "BadRow"),
        (6, "Row"),
    ]
    table = write(tmp_path / "a.csv", 'a,b\n"two\nlines",1\n2,3\n')
    assert [row.line for row in read_rows(table)] == [2, 4]
    lines = write(tmp_path / "a.jsonl", '\n{"a": 1}\n\n{"a": 2}')
    assert [row.line for row in read_rows(lines)] == [2, 4]


@pytest.mark.parametrize(
    ("name", "content", "reasons"),
    [
        (
            "a.jsonl",
            b'{"a": "\xff"}\n{"a": 1}\n{"a": \n[1]\n"x"\n',
            ["broken UTF-8", None, "broken JSON", "wrong type", "wrong type"],
        ),
        ("a.jsonl", b'{"a": {"b": ["\\ud800"]}}\n{"a": "\\ud83d\\ude00"}\n', ["broken UTF-8", None]),
        ("a.jsonl", b"[" * 100_000, ["broken JSON"]),
        ("a.json", b'[{"a": 1}, {"a": ', [None, BROKEN_FILE]),
        ("a.json", b'[{"a": 1}', [None, BROKEN_FILE]),
        ("a.json", b'[{"a": 1} {"a": 2}]', [None, BROKEN_FILE]),
        ("a.json", b'[{"a": "\xff"}]', [BROKEN_FILE]),
        ("a.csv", b"a,b\n1,2\n3\n4,\xff\n5,6\n", [None, "broken CSV", "broken UTF-8", None]),
        ("a.csv", b'a,b\n1,2\n"3" x,4\n5,6\n', [None, "broken CSV", None]),
        ("a.csv", b'a,b\n1,2\n"3,4\n5,6\n', [None, BROKEN_FILE]),
        ("a.csv", b"a,a\n1,2\n", [BROKEN_FILE]),
        ("a.parquet", b"not parquet", [BROKEN_FILE]),
        ("a.txt", b"one\ntwo \xff\n", ["broken UTF-8"]),
    ],
)
def test_damage_is_named_and_the_rest_is_kept(tmp_path: Path, name: str, content: bytes, reasons: list) -> None:
    rows = list(read_rows(write(tmp_path / name, content)))
    assert [row.reason if isinstance(row, BadRow) else None for row in rows] == reasons


def test_long_csv_fields_are_read(tmp_path: Path) -> None:
    assert len(values(write(tmp_path / "a.csv", f"a\n{'x' * 200_000}\n"))[0]["a"]) == 200_000


def test_broken_text_in_parquet_is_one_bad_row(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    broken = pa.array([b"good", b"\xff", b"good"]).cast(pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    assert [type(row).__name__ for row in read_rows(str(tmp_path / "a.parquet"))] == ["Row", "BadRow", "Row"]


def test_files_come_in_a_fixed_order_and_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.csv", ".hidden/d.jsonl", "README.md"):
        write(tmp_path / name, "")
    names = ["a.jsonl", "b.jsonl", "sub/c.csv"]
    assert [str(path.relative_to(tmp_path)) for path in list_files(str(tmp_path))] == names
    assert [path.name for path in list_files(str(tmp_path / "*.jsonl"))] == names[:2]
    both = list_files([str(tmp_path / "b.jsonl"), str(tmp_path)])
    assert [path.name for path in both] == ["b.jsonl", "a.jsonl", "c.csv"]


def test_what_is_no_data_is_said(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(DataError, match=r"did you mean 'train\.jsonl'"):
        list_files(str(tmp_path / "tran.jsonl"))
    with pytest.raises(DataError, match="suffix that Weft does not read"):
        list_files(write(tmp_path / "a.doc", ""))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no data file"):
        list_files(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="does not exist or is empty"):
        list_files(str(tmp_path / "absent" / "a.jsonl"))


@FAST
@given(lines=st.lists(st.binary(max_size=40)))
def test_random_lines_are_all_counted(tmp_path: Path, lines: list[bytes]) -> None:
    content = b"\n".join(line.replace(b"\n", b"") for line in lines)
    expected = sum(bool(line.strip()) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    assert len(list(read_rows(write(tmp_path / "a.jsonl", content)))) == expected


JSON_ROWS = st.dictionaries(st.text(max_size=5), st.text(max_size=10) | st.integers() | st.none(), max_size=3)


@FAST
@given(rows=st.lists(JSON_ROWS, max_size=5), broken=st.sets(st.integers(0, 4)))
def test_good_rows_survive_bad_neighbours(tmp_path: Path, rows: list[dict], broken: set[int]) -> None:
    lines = [b"{broken" if i in broken else json.dumps(row).encode() for i, row in enumerate(rows)]
    read = list(read_rows(write(tmp_path / "a.jsonl", b"\n".join(lines))))
    assert len(read) == len(rows)
    for i, (row, was) in enumerate(zip(read, rows, strict=True)):
        assert isinstance(row, BadRow) if i in broken else isinstance(row, Row) and row.values == was


@FAST
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"]))
def test_random_bytes_never_raise(tmp_path: Path, content: bytes, suffix: str) -> None:
    for row in read_rows(write(tmp_path / f"a{suffix}", content)):
        assert row.line >= 1


FIELDS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8), min_size=2, max_size=2)


@FAST
@given(rows=st.lists(FIELDS, max_size=6))
def test_csv_round_trip(tmp_path: Path, rows: list[list[str]]) -> None:
    stream = io.StringIO()
    csv.writer(stream).writerows([["a", "b"], *rows])
    assert values(write(tmp_path / "a.csv", stream.getvalue())) == [{"a": a, "b": b} for a, b in rows]
