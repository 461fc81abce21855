"""What the documentation says is so: its Python prints what is shown, its commands exist, its links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

import weft
from tests.docs_pages import ROOT, Page, follows, pages
from weft.core.method import _METHODS

PAGES = pages()
CHEAP = {"init", "doctor"}
"""Commands that are run as they stand; `methods NAME`, `--help` and `--dry-run` are too, the others are parsed."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder with the examples in it; methods that a page defines are forgotten after it."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    weft.methods()
    before, modules, threads = dict(_METHODS), set(sys.modules), torch.get_num_threads()
    yield tmp_path
    _METHODS.clear()
    _METHODS.update(before)
    torch.set_num_threads(threads)
    for name in set(sys.modules) - modules:
        if name.startswith("docs_page"):
            del sys.modules[name]


def run(page: Page) -> str:
    """Run a page's Python as one script; what it printed."""
    module = types.ModuleType("docs_page")
    module.__file__ = str(page.path)
    sys.modules["docs_page"] = module
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(page.script, str(page.path), "exec"), module.__dict__)
    return output.getvalue()


@pytest.mark.parametrize("page", [p for p in PAGES if p.script.strip()], ids=lambda page: page.name)
def test_python_runs_and_prints_what_is_shown(page: Page, place: Path) -> None:
    printed = run(page)
    expected = "\n".join(block.text for block in page.shown)
    missing = follows(expected, printed)
    assert missing is None, f"{page.name} shows {missing!r}, and this was printed:\n{printed}"


def weft_commands() -> list[Any]:
    return [
        pytest.param(page, line, command, id=f"{page.name}:{line}")
        for page in PAGES
        for line, command in page.commands
        if command.startswith("weft ")
    ]


@pytest.mark.parametrize(("page", "line", "command"), weft_commands())
def test_commands_exist(page: Page, line: int, command: str, place: Path) -> None:
    from weft.cli.main import app, main

    words = shlex.split(command.partition(" #")[0])[1:]
    cheap = words[0] in CHEAP or (words[0] == "methods" and len(words) == 2) or {"--help", "--dry-run"} & {*words}
    if cheap:
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(words + ["data.limit=4"] * ("--dry-run" in words)) == 0
        return
    group = typer.main.get_command(app)
    with group.make_context("weft", words, resilient_parsing=False) as context:
        rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
        name, found, arguments = group.resolve_command(context, rest)
        for word in [w for w in arguments if not w.startswith("-") and "/" in w and not w.startswith("examples")]:
            Path(word).parent.mkdir(parents=True, exist_ok=True)
        found.make_context(name, arguments, parent=context)


def recipes() -> list[Any]:
    return [
        pytest.param(block.text, id=f"{page.name}:{block.line}")
        for page in PAGES
        for block in page.blocks
        if block.language == "yaml"
    ]


@pytest.mark.parametrize("text", recipes())
def test_recipes_are_valid(text: str, place: Path) -> None:
    """Every YAML block is a recipe, or a part of one that needs data added."""
    from weft.recipe import load_recipe, resolve_method

    (place / "data").symlink_to(ROOT / "examples/data")
    (place / "train.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    whole = text if "data:" in text else f"{text}data: train.jsonl\n"
    (place / "recipe.yaml").write_text(whole, encoding="utf-8")
    resolve_method(load_recipe(place / "recipe.yaml").method, weft.methods())


def test_the_tutorial_shows_the_example() -> None:
    shown = next(b for b in Page(ROOT / "docs/tutorial.md").blocks if b.language == "yaml")
    example = (ROOT / "examples/docstrings.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(shown.text) == yaml.safe_load(example)


def test_other_commands_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    for page in [*PAGES, Page(ROOT / "CONTRIBUTING.md")]:
        everything = page.text
        for target in re.findall(r"(?:`|\$ )make ([a-z-]+)", everything):
            assert target in targets, f"{page.name}: there is no `make {target}`"
        for named in re.findall(r"(?:weft|pip install -e \"\.|\"\.)\[([\w,]+)\]", everything):
            assert {*named.split(",")} <= extras, f"{page.name}: there is no extra {named}"


@pytest.mark.parametrize("page", [*PAGES, Page(ROOT / "CONTRIBUTING.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Page) -> None:
    for target in page.links:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.path.parent / file).resolve() if file else page.path
        assert path.exists(), f"{page.name} links to {target}, and there is no such file"
        if anchor:
            assert anchor in Page(path).anchors, f"{page.name} links to {target}, and there is no such heading"


def test_every_page_is_in_the_navigation() -> None:
    listed = set(_files(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    there = {page.path.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}
    assert listed == there


def _files(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for each in entry.values() if isinstance(entry, dict) else entry:
            yield from _files(each)


def test_decisions_are_numbered_and_listed() -> None:
    index = (ROOT / "docs/decisions/index.md").read_text(encoding="utf-8")
    found = sorted(p.name for p in (ROOT / "docs/decisions").glob("[0-9]*.md"))
    assert [name[:4] for name in found] == [f"{i:04d}" for i in range(1, len(found) + 1)]
    assert all(f"({name})" in index for name in found)


def test_public_names_are_public() -> None:
    """Every `weft.something` in the prose can be had from the package, or is one of its rooms or files."""
    for page in [*PAGES, Page(ROOT / "CONTRIBUTING.md")]:
        for name in sorted(set(re.findall(r"`weft\.([A-Za-z_]+)", page.text)) - {"json"}):
            room = ROOT / "src/weft" / name
            known = hasattr(weft, name) or room.is_dir() or room.with_suffix(".py").is_file()
            assert known, f"{page.name}: there is no weft.{name}"


# The checks see what they are there for. ------------------------------------------------------------------------------


def test_shown_output_is_compared() -> None:
    assert follows("a 1 ...\nb", "a 1 x\nother\nb\n") is None
    assert follows("a 2", "a 1\n") == "a 2"
    assert follows("b\na", "a\nb\n") == "a"


def test_a_page_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "# A `b` c\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n[x](y.md#z)\n\n```console\n$ weft init\n```\n"
    )
    page = Page(path)
    assert page.script.splitlines()[3] == "print(1)"
    assert [block.text for block in page.shown] == ["1\n"]
    assert list(page.links) == ["y.md#z"]
    assert list(page.commands) == [(14, "weft init")]
    assert page.anchors == {"a-b-c"}


def test_the_pages_are_found() -> None:
    assert len(PAGES) >= 20
    assert sum(bool(page.script.strip()) for page in PAGES) >= 10
    assert len(weft_commands()) >= 10
