"""From a data section to splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weft.data.load import load_data, load_texts
from weft.errors import DataError
from weft.recipe import Data


@pytest.fixture
def write(tmp_path: Path):
    def write_rows(name: str, rows: list) -> str:
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return str(path)

    return write_rows


def pairs(count: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"say {i}", "completion": f" {i}"} for i in range(start, start + count)]


def test_splits_and_reports(write: Any, byte_bpe: Any) -> None:
    train = write("train.jsonl", [*pairs(9), "{broken", {"prompt": "x"}])
    validation = write("validation.jsonl", pairs(3, start=8))
    splits = load_data(Data(train=train, validation=validation, max_bad_share=0.2), byte_bpe, context=64)
    assert (len(splits.train), len(splits.validation or ()), splits.test) == (9, 3, None)
    assert splits.layout.format == "prompt-completion"
    assert splits.max_length == 64
    report, other = splits.reports
    assert {finding.reason for finding in report.bad} == {"broken JSON", "missing column"}
    assert not report.warnings
    assert [(finding.reason, finding.count) for finding in other.warnings] == [("also in train", 1)]
    with pytest.raises(DataError, match="2 of 11 rows are bad"):
        load_data(Data(train=train), byte_bpe)


def test_limit_counts_rows(write: Any, byte_bpe: Any) -> None:
    data = Data(train=write("train.jsonl", pairs(9)), limit=4)
    assert load_data(data, byte_bpe).train.report.num_rows == 4


def test_chat_rows_end_with_their_own_token(write: Any, byte_bpe: Any) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    splits = load_data(Data(train=write("train.jsonl", [{"messages": turns}])), byte_bpe)
    assert not splits.train.report.warnings
    endless = byte_bpe.chat_template.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
    marked, byte_bpe.chat_template = byte_bpe.chat_template, endless
    try:
        [warning] = load_data(Data(train=write("train.jsonl", [{"messages": turns}])), byte_bpe).train.report.warnings
    finally:
        byte_bpe.chat_template = marked
    assert "will not learn to stop" in warning.reason


def test_classification_labels_come_from_training(write: Any, word_piece: Any) -> None:
    train = write("train.jsonl", [{"text": "hello", "label": label} for label in ("b", "a", "c")])
    validation = write("validation.jsonl", [{"text": "there", "label": label} for label in ("c", "d")])
    data = Data(train=train, validation=validation, max_bad_share=0.5)
    splits = load_data(data, word_piece, task="classification")
    assert splits.label_names == ("a", "b", "c")
    assert [example.labels for example in splits.train.examples] == [1, 0, 2]
    assert splits.validation is not None
    assert [finding.reason for finding in splits.validation.report.bad] == ["unknown label"]


def test_whole_number_labels_keep_their_order(write: Any, word_piece: Any) -> None:
    train = write("train.jsonl", [{"text": "hello", "label": label} for label in (10, 9.0, 0, "2")])
    assert load_data(Data(train=train), word_piece, task="classification").label_names == ("0", "2", "9", "10")
    with pytest.raises(DataError, match="a classifier needs two"):
        load_data(Data(train=train, limit=1), word_piece, task="classification")


def test_max_length(write: Any, byte_bpe: Any) -> None:
    train = write("train.jsonl", pairs(2))
    assert load_data(Data(train=train), byte_bpe).max_length == byte_bpe.model_max_length
    assert load_data(Data(train=train), byte_bpe, context=10**5).max_length == byte_bpe.model_max_length
    with pytest.raises(DataError, match="the base reads 64 tokens at most"):
        load_data(Data(train=train, max_length=65), byte_bpe, context=64)


def test_texts_for_measuring(tmp_path: Path, byte_bpe: Any) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox " * 50)
    (tmp_path / "b.txt").write_text("hello there")
    texts = load_texts(str(tmp_path), byte_bpe, max_length=16, limit=5)
    assert len(texts) == 5
    assert max(texts.lengths) == 16
    assert texts.report.num_rows == 2
