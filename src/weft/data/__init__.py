"""From files to batches: read rows, find their format, render them as tokens, report what is bad, order and pad."""

from weft.data.batch import Batch, collate
from weft.data.detect import FORMATS, Layout, detect, detect_files
from weft.data.lint import Finding, LintReport, lint
from weft.data.load import Dataset, Splits, load_data, load_split, load_texts
from weft.data.order import Position, batches, epoch_order, num_batches
from weft.data.read import list_files, read_rows
from weft.data.render import RenderOptions, make_renderer, marked_text
from weft.data.rows import IGNORED, BadRow, Example, Row

__all__ = [
    "FORMATS",
    "IGNORED",
    "BadRow",
    "Batch",
    "Dataset",
    "Example",
    "Finding",
    "Layout",
    "LintReport",
    "Position",
    "RenderOptions",
    "Row",
    "Splits",
    "batches",
    "collate",
    "detect",
    "detect_files",
    "epoch_order",
    "lint",
    "list_files",
    "load_data",
    "load_split",
    "load_texts",
    "make_renderer",
    "marked_text",
    "num_batches",
    "read_rows",
]
