"""Rows from files, folders, globs and `datasets` folders, one at a time; a broken row is a BadRow, never raised."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from weft.data.rows import BadRow, Row
from weft.errors import DataError
from weft.files import find

__all__ = ["BROKEN_FILE", "SUFFIXES", "list_files", "read_rows"]

BROKEN_FILE = "broken file"  # an unknown number of rows is lost: stops the run whatever the allowed share
_DATASET_MARKS = ("state.json", "dataset_info.json")  # what datasets' save_to_disk writes
_MAX_CSV_FIELD = 2**31 - 1


def read_rows(paths: str | Sequence[str]) -> Iterator[Row | BadRow]:
    """Every row of every file that `paths` name, in a fixed order. Raises DataError when a path names no data."""
    for path in list_files(paths):
        if path.is_dir():
            yield from _read_dataset(path)
        else:
            yield from _READERS[path.suffix.lower()](path)


def list_files(paths: str | Sequence[str]) -> list[Path]:
    """The data files (and `datasets` folders) behind files, folders and globs: sorted within each, none named twice."""
    found: dict[Path, None] = {}
    for name in [paths] if isinstance(paths, str) else paths:
        for path in find(name):
            found.update(dict.fromkeys(_files_of(path)))
    return list(found)


def _files_of(path: Path) -> list[Path]:
    if path.is_dir() and all((path / mark).exists() for mark in _DATASET_MARKS):
        return [path]
    if (path / "dataset_dict.json").exists():
        splits = sorted(item.name for item in path.iterdir() if item.is_dir())
        raise DataError(f"'{path}' holds the splits {', '.join(splits)}: name one of them, as in '{path / splits[0]}'")
    if path.is_dir():
        inside = (item for item in path.rglob("*") if item.is_file() and item.suffix.lower() in SUFFIXES)
        files = sorted(
            item for item in inside if not any(part.startswith(".") for part in item.relative_to(path).parts)
        )
        if not files:
            raise DataError(f"the folder '{path}' has no data file; Weft reads {', '.join(SUFFIXES)}")
        return files
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"'{path}' has a suffix that Weft does not read; it reads {', '.join(SUFFIXES)}")
    return [path]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_jsonl(path: Path) -> Iterator[Row | BadRow]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
            if raw.strip():
                yield _parse_line(raw, str(path), line)


def _parse_line(raw: bytes, file: str, line: int) -> Row | BadRow:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRow(file, line, "broken UTF-8", f"byte {error.start + 1}: {error.reason}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow(file, line, "broken JSON", str(error))
    return _as_row(value, file, line)


def _as_row(value: Any, file: str, line: int) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(file, line, "wrong type", f"a row is an object of columns, this is a {type(value).__name__}")
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")  # finds lone surrogates at any depth
    except (UnicodeEncodeError, RecursionError) as error:
        return BadRow(file, line, "broken UTF-8", str(error))
    return Row(value, file, line)


def _read_json(path: Path) -> Iterator[Row | BadRow]:
    """An array of objects, or, as is often found under this name, JSON lines."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        yield BadRow(str(path), line, BROKEN_FILE, f"not UTF-8 at byte {error.start + 1}: {error.reason}")
        return
    if text.lstrip()[:1] == "[":
        yield from _read_array(text, str(path))
        return
    try:
        value = json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        yield from _read_jsonl(path)
        return
    if text.strip():
        yield _as_row(value, str(path), 1)


def _read_array(text: str, file: str) -> Iterator[Row | BadRow]:
    """The elements of a JSON array one by one, so that each has its line and those before a break are kept."""
    decoder, position, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        position = _skip(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield BadRow(file, line, BROKEN_FILE, f"the rest of the array cannot be read: {error}")
            return
        yield _as_row(value, file, line)
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "]":
            yield BadRow(file, line, BROKEN_FILE, "the array goes on without a comma or ends without ']'")
            return


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _read_csv(path: Path) -> Iterator[Row | BadRow]:
    csv.field_size_limit(_MAX_CSV_FIELD)  # the default, 131072, is shorter than many documents
    file = str(path)
    # surrogateescape carries broken bytes through the parser, so that one broken row does not end the file
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        # strict: a quote that is never closed would otherwise swallow the rest of the file as one field
        reader = csv.reader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                at_end = "unexpected end" in str(error)
                yield BadRow(file, line, BROKEN_FILE if at_end or header is None else "broken CSV", str(error))
                if at_end or header is None:
                    return
                continue
            if header is None and fields:
                header = fields
                if len(set(header)) < len(header) or not _is_text("".join(header)):
                    yield BadRow(file, line, BROKEN_FILE, f"column names are not distinct text: {header}")
                    return
            elif header is not None and fields:
                yield _csv_row(header, fields, file, line)


def _csv_row(header: list[str], fields: list[str], file: str, line: int) -> Row | BadRow:
    if len(fields) != len(header):
        return BadRow(file, line, "broken CSV", f"{len(fields)} fields where the header names {len(header)}")
    if not all(_is_text(field) for field in fields):
        return BadRow(file, line, "broken UTF-8", "bytes that are not UTF-8")
    return Row(dict(zip(header, fields, strict=True)), file, line)


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path) -> Iterator[Row | BadRow]:
    import pyarrow as pa
    from pyarrow import parquet

    line = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for index in range(batch.num_rows):
                    line += 1
                    yield _arrow_row(batch.slice(index, 1), str(path), line)
    except (pa.ArrowException, OSError) as error:
        yield BadRow(str(path), line + 1, BROKEN_FILE, str(error).splitlines()[0])


def _arrow_row(batch: Any, file: str, line: int) -> Row | BadRow:
    try:
        return Row(batch.to_pylist()[0], file, line)
    except UnicodeDecodeError as error:
        return BadRow(file, line, "broken UTF-8", f"{error.reason} in a text column")


def _read_text(path: Path) -> Iterator[Row | BadRow]:
    """A text file is one document."""
    raw = path.read_bytes()
    try:
        text = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8-sig").read()  # also makes every line end "\n"
    except UnicodeDecodeError:
        line = next(number for number, part in enumerate(raw.split(b"\n"), start=1) if not _decodes(part))
        yield BadRow(str(path), line, "broken UTF-8", "the document is left out")
        return
    yield Row({"text": text}, str(path), 1)


def _decodes(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_dataset(path: Path) -> Iterator[Row | BadRow]:
    """A folder written by datasets' save_to_disk; class indices become their names."""
    import datasets

    try:
        table = datasets.load_from_disk(str(path))
        names = {key: kind.names for key, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)}
    except Exception as error:  # whatever a damaged folder makes the library raise
        yield BadRow(str(path), 1, BROKEN_FILE, str(error).splitlines()[0] if str(error) else type(error).__name__)
        return
    for line, values in enumerate(table, start=1):
        named = {
            key: labels[values[key]] for key, labels in names.items() if values[key] is not None and values[key] >= 0
        }
        yield Row({**values, **named}, str(path), line)


_READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
SUFFIXES = tuple(_READERS)
