"""Recipes: defaults, shorthands, overrides, paths, and an error for each mistake that says what to write instead."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.errors import MissingExtra, RecipeError, WeftError, missing_extra, nearest
from weft.recipe import Recipe, all_keys, commented_template, docs_table, expected, load_recipe, resolve_method, to_yaml


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    return tmp_path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def problem(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "")


def test_shorthands_and_defaults(folder: Path) -> None:
    recipe = load(folder, "base: org/model\ndata: train.jsonl\nmethod: dora\n")
    assert recipe.base.model == "org/model"
    assert recipe.data.train == str(folder / "train.jsonl")
    assert recipe.method == {"name": "dora"}
    assert (recipe.targets, recipe.layers, recipe.task) == (None, None, "causal-lm")
    assert (recipe.train.steps, recipe.train.epochs) == (None, None)
    with pytest.raises(ValueError, match="frozen"):
        recipe.task = "classification"


def test_the_commented_template_is_the_default_recipe(folder: Path) -> None:
    text = commented_template()
    assert load(folder, text) == load(folder, "data: train.jsonl")
    written = yaml.safe_load(text)
    for key, field in all_keys():
        section = written
        for part in key.split("."):
            section = section[part]
        assert field.description, key
        assert expected(field), key
    assert max(len(line) for line in text.splitlines()) <= 120


def test_a_written_recipe_reads_back(folder: Path) -> None:
    text = (
        "data: {train: train.jsonl, columns: {text: body}}\nlayers: 0-3\nsave_modules: [head]\ntargets: {q: {rank: 2}}"
    )
    recipe = load(folder, text, "train.betas=[0.8, 0.9]", "check=null", "forgetting=null")
    (folder / "elsewhere").mkdir()
    assert load(folder / "elsewhere", to_yaml(recipe)) == recipe


def test_every_key_is_in_the_table() -> None:
    table = docs_table()
    assert "| `train.learning_rate` | a number > 0 | `0.0002` | the peak, after warm-up |" in table
    assert table.count("\n") == 2 + sum(1 for key, _ in all_keys() if f"| `{key}` |" in table)
    assert "`data.train` | text or a list of text | (required) |" in table


def test_numbers_are_read_as_people_write_them(folder: Path) -> None:
    recipe = load(
        folder,
        "data: train.jsonl\nmethod: {name: x, a: 1e-4, b: 2E3, c: -1.5e+2, d: 1e4x}\n",
        "train.learning_rate=5e-5",
    )
    assert recipe.method == {"name": "x", "a": 1e-4, "b": 2000.0, "c": -150.0, "d": "1e4x"}
    assert recipe.train.learning_rate == 5e-5


def test_overrides(folder: Path) -> None:
    text = "base: {model: pico, dtype: bfloat16}\ndata: train.jsonl\nmethod: {name: lora, rank: 4}\nforgetting: null\n"
    recipe = load(folder, text, "base=other", "method.rank=2", "targets=[q_proj, v_proj]", "forgetting.limit=3")
    assert (recipe.base.model, recipe.base.dtype) == ("other", "bfloat16")
    assert recipe.method == {"name": "lora", "rank": 2}
    assert recipe.targets == ("q_proj", "v_proj")
    assert recipe.forgetting is not None
    assert recipe.forgetting.limit == 3
    assert load(folder, text, "method=ia3").method == {"name": "ia3"}  # another method has other hyper-parameters
    assert load(folder, text, "train.steps=5", "train.steps=6").train.steps == 6


def test_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = folder / "work"
    work.mkdir()
    (work / "own.jsonl").write_text("")
    monkeypatch.chdir(work)
    recipe = load(folder, "base: ./model\ndata: {train: [train.jsonl, '*.jsonl']}", "data.validation=own.jsonl")
    assert recipe.base.model == str(folder / "model")
    assert recipe.data.train == (str(folder / "train.jsonl"), str(folder / "*.jsonl"))
    assert recipe.data.validation == str(work / "own.jsonl")
    assert recipe.output == str(work / "runs" / "recipe")
    assert load(folder, "data: train.jsonl\noutput: here").output == str(work / "here")


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "data: train.jsonl\ntrain:\n  learning_rat: 1",
            [],
            "recipe.yaml:3: train.learning_rat: there is no such key; did you mean 'learning_rate'?",
        ),
        (
            "data: train.jsonl\nlearning_rate: 1",
            [],
            "recipe.yaml:2: learning_rate: there is no such key; did you mean 'train.learning_rate'?",
        ),
        ("data: train.jsonl\nxyz: 1", [], "known: base, check, data"),
        (
            "data: train.jsonl\ntrain:\n  batch_size: many",
            [],
            "recipe.yaml:3: train.batch_size: found 'many' (text), expected a whole number >= 1",
        ),
        (
            "data: {train: train.jsonl, template: chatt}",
            [],
            "expected one of chat, plain or null; did you mean 'chat'?",
        ),
        ("data: train.jsonl\ntrain: {optimizer: {eps: 1}}", [], "options stand beside a name, as in {name: wsd"),
        ("data: train.jsonl\ntrain: {betas: [0.9, 2]}", [], "expected a list of 2 numbers >= 0 and < 1"),
        (
            "data: train.jsonl\ntrain: {learning_rate: .inf}",
            [],
            "train.learning_rate: found inf (a number), expected a number > 0",
        ),
        ("data: train.jsonl\ntrain: {steps: 1, epochs: 1}", [], "steps and epochs are both given"),
        ("data: train.jsonl\ntrain: 3", [], "train: found 3 (a whole number), expected a section with the keys steps"),
        (
            "data: train.jsonl\ntargets: 5",
            [],
            "targets: found 5 (a whole number), expected text or a list of text or a mapping or null",
        ),
        ("data: train.jsonl\nlayers: 7-4", [], "a range of layers goes up"),
        ("data: train.jsonl\nlayers: all", [], 'layers are written as "4-7"'),
        ("data: train.jsonl\nmethod: {rank: 3}", [], "a method has a name"),
        ("data: tran.jsonl", [], "recipe.yaml:1: data.train: no data at 'tran.jsonl': did you mean 'train.jsonl'?"),
        ("base: pico", [], "data: is missing"),
        ("data: {limit: 3}", [], "recipe.yaml:1: data.train: is missing"),
        ("data: train.jsonl\ndata: train.jsonl", [], "recipe.yaml:2: data is written twice, first on line 1"),
        ("data: {train: train.jsonl, train: x}", [], "data.train is written twice"),
        ("a: [1", [], "is not YAML"),
        ("a: !!python/object:os.system x", [], "is not YAML"),
        ("- 1", [], "a recipe is a mapping of keys"),
        ("", [], "holds nothing"),
        (
            "data: train.jsonl",
            ["train.steps=0"],
            "override train.steps: found 0 (a whole number), expected a whole number >= 1 or null",
        ),
        ("data: train.jsonl", ["tran.steps=1"], "override tran: there is no such key; did you mean 'train'?"),
        ("data: train.jsonl", ["steps"], "not of the form key=value"),
        ("data: train.jsonl", ["train.steps=[1"], "is not YAML"),
        ("data: train.jsonl", ["check.ways=[mergd]"], "expected a list of any of saved, merged"),
    ],
)
def test_mistakes(folder: Path, text: str, overrides: list[str], message: str) -> None:
    assert message in problem(folder, text, *overrides)


def test_every_mistake_is_reported_at_once(folder: Path) -> None:
    assert len(problem(folder, "data: train.jsonl\ntask: x\ntargets: 5\ntrain: {steps: 0, seed: -1}").splitlines()) == 4


def test_keys_that_do_not_go_together_are_told_without_the_whole_section(folder: Path) -> None:
    said = problem(folder, "data: t.jsonl\ntrain: {steps: 3, optimizer_in_backward: true}")
    assert "set clip_norm to null" in said
    assert "found" not in said


def test_a_recipe_that_is_not_there(folder: Path) -> None:
    (folder / "docstrings.yaml").write_text("")
    with pytest.raises(RecipeError, match=r"did you mean 'docstrings\.yaml'"):
        load_recipe(folder / "docstring.yaml")
    with pytest.raises(RecipeError, match="weft init"):
        load_recipe(folder / "absent" / "a.yaml")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.text(alphabet="abcdt:{}[]&*!? \n-1'#", max_size=40).map(str.encode))
def test_whatever_is_in_the_file_is_a_recipe_or_a_recipe_error(folder: Path, content: bytes) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError):  # none of these names its data
        load_recipe(path)


@pytest.mark.parametrize(
    "text", ["data: &a {train: *a}", "a: &a [*a]\ndata: train.jsonl", "method: &a {name: x, b: *a}"]
)
def test_a_recipe_that_contains_itself_is_an_error(folder: Path, text: str) -> None:
    assert problem(folder, text)


@dataclass(frozen=True)
class Lora:
    rank: int = 8

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}")


@dataclass(frozen=True)
class Bones:
    sizes: tuple[int, ...] = ()
    heads: tuple[int, ...] | None = None
    rank: int = 8


def test_methods_are_resolved_by_name() -> None:
    known = {"lora": Lora}
    assert resolve_method({"name": "lora", "rank": 2}, known) == Lora(2)
    with pytest.raises(RecipeError, match="did you mean 'lora'"):
        resolve_method({"name": "lorra"}, known)
    with pytest.raises(RecipeError, match=r"method\.rnk: lora has no such hyper-parameter; did you mean 'rank'"):
        resolve_method({"name": "lora", "rnk": 2}, known)
    with pytest.raises(RecipeError, match="rank is 0"):
        resolve_method({"name": "lora", "rank": 0}, known)


def test_a_list_is_a_tuple_where_a_method_wants_one(folder: Path) -> None:
    recipe = load(folder, "data: train.jsonl\nmethod: {name: bones, sizes: [2, 3], heads: [4], rank: 1}")
    assert resolve_method(recipe.method, {"bones": Bones}) == Bones((2, 3), (4,), 1)


def test_errors_say_what_to_do() -> None:
    assert nearest("batchsize", ["batch_size", "seed"]) == "did you mean 'batch_size'?"
    assert nearest("x", ["b", "a"]) == "known: a, b"
    assert nearest("x", []) == "none are known"
    error = missing_extra("quant", needs="bitsandbytes")
    assert isinstance(error, MissingExtra)
    assert isinstance(error, ImportError)
    assert isinstance(error, WeftError)
    assert str(error) == "bitsandbytes is not installed; install it with: pip install 'weft[quant]'"


def test_the_recipe_needs_no_torch() -> None:
    code = "import sys, weft.recipe; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
