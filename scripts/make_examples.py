"""Cut the bundled example tasks from the standard library's sources and the interpreter's C headers.

    python scripts/make_examples.py --out examples/data

Writes four folders of {train,validation,test}.jsonl (docstrings, preferences, packages, headers), `modules.json`
(which source file went to which split) and a README.md. Splits follow `corpus.py`, so the base model has seen no
validation or test module.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import platform
import random
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from corpus import LICENCE, SPLITS, Module, corpus_facts, digest, modules
from transformers import AutoTokenizer

SEED = 20261121
TASK_SPLITS = SPLITS[:3]  # the held-out packages stay out of every task
TOKENIZER = Path(__file__).resolve().parent.parent / "src" / "weft" / "assets" / "pico"

MAX_PAIR_TOKENS, MIN_SUMMARY, MAX_SUMMARY = 400, 15, 120
MAX_PAIRS = {"train": 3000, "validation": 300, "test": 300}
MAX_PREFERENCES = {"train": 600, "validation": 100, "test": 100}

CLASSES = (
    "asyncio", "distutils", "encodings", "http", "idlelib", "importlib",
    "lib2to3", "logging", "multiprocessing", "test", "urllib", "xml",
)  # fmt: skip
MIN_DOCSTRING, MAX_DOCSTRING = 20, 500
MAX_PER_CLASS = {"train": 150, "validation": 40, "test": 40}

HEADER_CHARACTERS = 1200
SHINGLE_WORDS, NEAR = 5, 0.8


@dataclass(frozen=True)
class Row:
    """One example, and the source file and split that it came from."""

    values: dict[str, str]
    source: str
    split: str

    @property
    def text(self) -> str:
        """What is compared with other rows: everything but a label."""
        return " ".join(value for key, value in self.values.items() if key != "label")


def normalised(text: str) -> str:
    """Lower case, words only: what two near-verbatim copies share."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def shingles(text: str) -> frozenset[str]:
    """Every run of `SHINGLE_WORDS` words of a normalised text, or the whole text if it is shorter."""
    words = text.split()
    runs = range(max(1, len(words) - SHINGLE_WORDS + 1))
    return frozenset(" ".join(words[start : start + SHINGLE_WORDS]) for start in runs)


class Seen:
    """Remembers rows; says whether a row nearly repeats one that it holds (Jaccard index of the shingles)."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._rows_with: dict[str, list[int]] = defaultdict(list)

    def repeats(self, text: str) -> bool:
        """Whether a remembered text is the same, or shares at least `NEAR` of the shingles."""
        wanted = shingles(normalised(text))
        shared = Counter(row for shingle in wanted for row in self._rows_with.get(shingle, ()))
        return any(count / (len(wanted) + self._sizes[row] - count) >= NEAR for row, count in shared.items())

    def add(self, text: str) -> None:
        """Remember a text."""
        wanted = shingles(normalised(text))
        for shingle in wanted:
            self._rows_with[shingle].append(len(self._sizes))
        self._sizes.append(len(wanted))


def without_repeats(rows: Iterable[Row]) -> list[Row]:
    """Drop every row that nearly repeats an earlier one; test rows come first, so that a copy is lost by train."""
    order = {"test": 0, "validation": 1, "train": 2}
    seen, kept = Seen(), []
    for row in sorted(rows, key=lambda row: (order[row.split], row.source)):
        if not seen.repeats(row.text):
            seen.add(row.text)
            kept.append(row)
    return kept


def sample(rows: list[Row], limits: dict[str, int]) -> list[Row]:
    """At most `limits[split]` rows for each split and label, drawn by the hash of the row."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: digest(f"{SEED} {row.text}")):
        groups[row.split, row.values.get("label", "")].append(row)
    chosen = [row for (split, _), group in sorted(groups.items()) for row in group[: limits[split]]]
    random.Random(SEED).shuffle(chosen)
    return chosen


def parsed_modules() -> Iterator[tuple[Module, ast.Module]]:
    """The modules of the task splits that are valid Python."""
    for module in modules():
        if module.split in TASK_SPLITS:
            try:
                yield module, ast.parse(module.text)
            except SyntaxError:  # some files of the test suites are broken on purpose
                continue


def function_without_docstring(module: Module, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The source of a documented function, dedented, with the lines of its docstring cut out."""
    lines = module.text.splitlines(keepends=True)
    docstring = node.body[0]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    kept = lines[first : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return "".join(line[node.col_offset :] if line.strip() else "\n" for line in kept).rstrip("\n") + "\n"


def summary(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """The first line of the docstring, if it is a sentence of its own and there is a body that it sums up."""
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2 or node.body[0].lineno == node.lineno:
        return None
    first, *rest = docstring.split("\n")
    whole = not rest or not rest[0].strip()
    plain = first[:1].isalpha() and "->" not in first and " " in first
    return first.strip() if whole and plain and MIN_SUMMARY <= len(first) <= MAX_SUMMARY else None


def docstring_rows() -> list[Row]:
    """Function source without its docstring -> the docstring's first line."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, local_files_only=True, model_max_length=10**6)
    rows = []
    for module, tree in parsed_modules():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            completion = summary(node)
            if completion is None or node.body[1].lineno <= (node.body[0].end_lineno or 0):
                continue
            prompt = function_without_docstring(module, node)
            if len(tokenizer.encode(prompt + completion, add_special_tokens=False)) <= MAX_PAIR_TOKENS:
                rows.append(Row({"prompt": prompt, "completion": completion}, module.path, module.split))
    return sample(without_repeats(rows), MAX_PAIRS)


def preference_rows(docstrings: list[Row]) -> list[Row]:
    """A function with its own first line, and with that of another function of the same split."""
    rows = []
    for split in TASK_SPLITS:
        mine = [row for row in docstrings if row.split == split][: MAX_PREFERENCES[split]]
        others = random.Random(f"{SEED} {split}")
        for row in mine:
            own = row.values["completion"]
            wrong = others.choice([other.values["completion"] for other in mine if other.values["completion"] != own])
            values = {"prompt": row.values["prompt"], "chosen": own, "rejected": wrong}
            rows.append(Row(values, row.source, split))
    return rows


def package_label(module: Module) -> str:
    """The package of a module; a test suite in the package `test` counts for the class that its file name names."""
    if module.package != "test":
        return module.package
    parts = module.path.removesuffix(".py").split("/")[1:]
    labels = [label for label in CLASSES if label != "test"]
    named = (label for label in labels for part in parts if part.startswith((f"test_{label}", f"{label}_")))
    return next(named, "test")


def package_rows() -> list[Row]:
    """A docstring -> the package that it is from."""
    rows = []
    for module, tree in parsed_modules():
        label = package_label(module)
        if label not in CLASSES:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = inspect.cleandoc(ast.get_docstring(node) or "")
                if MIN_DOCSTRING <= len(text) <= MAX_DOCSTRING:
                    rows.append(Row({"text": text, "label": label}, module.path, module.split))
    return sample(without_repeats(rows), MAX_PER_CLASS)


def header_rows() -> list[Row]:
    """Passages of the interpreter's C headers, cut between lines; the files are split by the hash of their path."""
    root = Path(sysconfig.get_path("include"))
    paths = sorted((file.relative_to(root).as_posix() for file in root.rglob("*.h")), key=digest)
    each = round(len(paths) / 10)
    rows = []
    for rank, path in enumerate(paths):
        split = "test" if rank < each else "validation" if rank < 2 * each else "train"
        rows += [Row({"text": text}, path, split) for text in passages((root / path).read_text(encoding="utf-8"))]
    kept = without_repeats(rows)
    random.Random(SEED).shuffle(kept)
    return kept


def passages(text: str) -> Iterator[str]:
    """Consecutive pieces of a text of about `HEADER_CHARACTERS`, cut between lines; a short tail is dropped."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > HEADER_CHARACTERS:
            yield piece
            piece = ""
        piece += line
    if len(piece) >= HEADER_CHARACTERS // 4:
        yield piece


def check(task: str, rows: list[Row]) -> None:
    """Refuse a task whose splits share a source file or a near-verbatim text, or lack a class."""
    sources = {split: {row.source for row in rows if row.split == split} for split in TASK_SPLITS}
    labels = {split: {row.values.get("label") for row in rows if row.split == split} for split in TASK_SPLITS}
    seen = Seen()
    for index, split in enumerate(TASK_SPLITS):
        for other in TASK_SPLITS[:index]:
            shared = sources[split] & sources[other]
            if shared:
                raise ValueError(f"{task}: {min(shared)} is in both {other} and {split}; a file has one split")
        if labels[split] != labels["train"]:
            raise ValueError(f"{task}: {split} has not the classes of train: {labels['train'] ^ labels[split]} differ")
        mine = [row for row in rows if row.split == split]
        for row in mine:
            if seen.repeats(row.text):
                raise ValueError(f"{task}: a row of {row.source} in {split} nearly repeats one of another split")
        for row in mine:
            seen.add(row.text)


def write(out: Path, tasks: dict[str, list[Row]]) -> None:
    """Write the rows, the list of source files and the README."""
    sources: dict[str, dict[str, list[str]]] = {}
    for task, rows in tasks.items():
        (out / task).mkdir(parents=True, exist_ok=True)
        sources[task] = {split: sorted({row.source for row in rows if row.split == split}) for split in TASK_SPLITS}
        for split in TASK_SPLITS:
            lines = [json.dumps(row.values, ensure_ascii=False) + "\n" for row in rows if row.split == split]
            (out / task / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    (out / "modules.json").write_text(json.dumps(sources, indent=0) + "\n", encoding="utf-8")
    (out / "README.md").write_text(readme(out, tasks), encoding="utf-8")


def counts_table(out: Path, tasks: dict[str, list[Row]]) -> str:
    """Rows, source files and bytes of every task and split, as Markdown."""
    lines = ["| task | split | rows | source files | bytes |", "| --- | --- | ---: | ---: | ---: |"]
    for task, rows in tasks.items():
        for split in TASK_SPLITS:
            mine = [row for row in rows if row.split == split]
            num_bytes = (out / task / f"{split}.jsonl").stat().st_size
            lines.append(f"| {task} | {split} | {len(mine)} | {len({row.source for row in mine})} | {num_bytes:,} |")
    return "\n".join(lines)


def classes_table(rows: list[Row]) -> str:
    """Rows of every class and split, and how often the text names its class, as Markdown."""
    lines = ["| class | train | validation | test | names its package |", "| --- | ---: | ---: | ---: | ---: |"]
    for label in CLASSES:
        mine = [row for row in rows if row.values["label"] == label]
        count = Counter(row.split for row in mine)
        leak = sum(label in row.values["text"].lower() for row in mine) / len(mine)
        numbers = " | ".join(str(count[split]) for split in TASK_SPLITS)
        lines.append(f"| {label} | {numbers} | {leak:.0%} |")
    return "\n".join(lines)


def readme(out: Path, tasks: dict[str, list[Row]]) -> str:
    """The README of the example data."""
    facts = corpus_facts()
    return f"""# Example data

Four small tasks for trying an adapter without a download. All text is from CPython {platform.python_version()}: the
sources of its standard library and its C headers. `python scripts/make_examples.py --out examples/data` makes
these files again from the same interpreter; the SHA-256 of the corpus is
`{facts["corpus_sha256"]}`.

| task | row | what an adapter learns |
| --- | --- | --- |
| `docstrings` | `{{"prompt", "completion"}}` | a function without its docstring -> the docstring's first line |
| `preferences` | `{{"prompt", "chosen", "rejected"}}` | to prefer a function's own first line to another's |
| `packages` | `{{"text", "label"}}` | a docstring -> which of {len(CLASSES)} packages it is from |
| `headers` | `{{"text"}}` | to write another style: C headers instead of Python |

## Counts

{counts_table(out, tasks)}

`packages`, by class. The text is left as it is, so some texts contain the name of their own package (last column):

{classes_table(tasks["packages"])}

## How it was cut

- One rule decides the split of every Python module (`scripts/corpus.py`), and the bundled base model `pico` was
  pretrained on *train* modules only: it has seen no validation or test module, and nothing of the held-out
  packages. The train rows of `docstrings` and `packages` come from files that pico has seen; C headers it has not.
- `docstrings`: functions whose docstring begins with a line of {MIN_SUMMARY} to {MAX_SUMMARY} characters that stands
  alone; prompt and completion together have at most {MAX_PAIR_TOKENS} pico tokens; at most {MAX_PAIRS["train"]} rows
  in train, {MAX_PAIRS["test"]} in the others.
- `preferences`: the first {MAX_PREFERENCES["train"]} rows of `docstrings` in train, {MAX_PREFERENCES["test"]} in the
  others. The chosen answer is the function's real first line. The rejected one is the real first line of another of
  these functions, drawn at random: nobody judged the answers, so what is learnt is to fit the function at hand.
- `packages`: docstrings of modules, classes and functions of {MIN_DOCSTRING} to {MAX_DOCSTRING} characters; at most
  {MAX_PER_CLASS["train"]} a class in train, {MAX_PER_CLASS["test"]} in the others. A suite of `Lib/test` counts for the
  class that its file name names (`test_asyncio/...` is asyncio), the rest of `Lib/test` is the class `test`.
- `headers`: passages of about {HEADER_CHARACTERS} characters in a row, cut between lines; split by file.
- A row that nearly repeats another (Jaccard index of five-word runs of {NEAR} or more, after lower-casing and
  dropping punctuation) is dropped; the test split keeps it first, then validation.
- `modules.json` lists the source files of every split. The script refuses to write a task whose splits share a
  file or a near-verbatim text, and `tests/test_assets.py` checks the files again.

## Licence

The text is copied from CPython, (c) Python Software Foundation, and is under CPython's licence:
{LICENCE}. The full text is at https://docs.python.org/3/license.html.
"""


def main() -> None:
    """Read the command line, cut the tasks, check them and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, such as examples/data")
    arguments = parser.parse_args()
    docstrings = docstring_rows()
    tasks = {
        "docstrings": docstrings,
        "preferences": preference_rows(docstrings),
        "packages": package_rows(),
        "headers": header_rows(),
    }
    for task, rows in tasks.items():
        check(task, rows)
    write(arguments.out, tasks)
    print(counts_table(arguments.out, tasks))


if __name__ == "__main__":
    main()
