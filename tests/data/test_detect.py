"""Detection: each format by its columns, by mapping, by name; and no guess."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from weft.data.detect import FORMATS, detect, detect_files
from weft.data.rows import Row
from weft.errors import DataError
from weft.recipe import Data


def rows(*columns: str, count: int = 1) -> list[Row]:
    return [Row(dict.fromkeys(columns, "x"), "f", line) for line in range(1, count + 1)]


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_found_among_other_columns(name: str) -> None:
    kind = FORMATS[name]
    layout = detect(rows("id", *kind.needs), task=kind.task)
    assert layout.format == name
    assert layout.columns == {part: part for part in kind.needs}


def test_optional_parts_are_taken_where_they_are() -> None:
    assert detect(rows("instruction", "input", "output")).columns.keys() == {"instruction", "input", "output"}


def test_the_task_decides_between_text_and_text_label() -> None:
    assert detect(rows("text", "label")).format == "text"
    assert detect(rows("text", "label"), task="classification").format == "text-label"


def test_columns_with_other_names_are_mapped() -> None:
    layout = detect(rows("question", "answer", "text"), columns={"prompt": "question", "completion": "answer"})
    assert layout.format == "prompt-completion"
    assert layout.columns == {"prompt": "question", "completion": "answer"}


def test_one_odd_row_decides_nothing() -> None:
    assert detect(rows("oops") + rows("text", count=5)).format == "text"


def test_two_formats_are_an_error_until_one_is_named() -> None:
    both = rows("instruction", "output", "text")
    with pytest.raises(DataError, match=r"more than one format \(alpaca, text\)"):
        detect(both)
    assert detect(both, format_name="alpaca").format == "alpaca"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"columns body, title do not fit any format.*prompt-completion \(prompt, completion\)"),
        ({"format_name": "text"}, "do not fit the format text"),
        ({"format_name": "alpca"}, "did you mean 'alpaca'"),
        ({"columns": {"promt": "title"}}, "did you mean 'prompt'"),
        ({"columns": {"prompt": "titel"}}, "did you mean 'title'"),
        ({"format_name": "text", "columns": {"label": "title"}}, "not a part of text"),
    ],
)
def test_what_does_not_fit_is_said(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        detect(rows("title", "body"), **options)


def test_files_without_a_readable_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match="they are empty"):
        detect_files(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text("{broken")
    with pytest.raises(DataError, match=r"a\.jsonl:1: broken JSON"):
        detect_files(str(tmp_path / "a.jsonl"))


def test_the_recipe_names_the_same_formats() -> None:
    assert set(get_args(get_args(Data.model_fields["format"].annotation)[0])) == set(FORMATS)
