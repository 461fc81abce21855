"""SubTuning's greedy choice of layers, on the tiny base of the training tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.compare.test_comparison import recipe
from tests.tune import runs
from weft.compare import choose_layers
from weft.compare import layers as module
from weft.errors import RecipeError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    runs.make_base(folder / "base")
    runs.make_data(folder / "data")
    return folder


def full(tiny: Path, **changes: Any) -> Any:
    made = recipe(tiny, {"name": "full"}, targets="all-linear", **changes)
    return made.model_copy(update={"train": made.train.model_copy(update={"learning_rate": 0.01})})


def test_layers_are_chosen_one_by_one_and_nothing_is_done_twice(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    found = choose_layers(full(tiny), output=tmp_path, console=runs.quiet())
    assert {*found.layers} == {0, 1}  # both help on this data
    assert [{*tried} for tried in found.rounds] == [{0, 1}, {0, 1} - {found.layers[0]}]
    assert found.losses[1] == min(found.rounds[0].values()) < found.losses[0]
    assert found.losses[2] == found.rounds[1][found.layers[1]] < found.losses[1]
    assert found.recipe(full(tiny)).layers == (0, 1)

    def fail(*_: Any) -> None:
        raise AssertionError("this was done already")

    monkeypatch.setattr(module, "trial", fail)
    assert choose_layers(full(tiny), output=tmp_path, console=runs.quiet()) == found
    one = choose_layers(full(tiny), most=1, output=tmp_path, console=runs.quiet())
    assert (one.layers, one.rounds) == (found.layers[:1], found.rounds[:1])
    gain = found.losses[1] - found.losses[2]
    stopped = choose_layers(full(tiny), least_gain=1.01 * gain, output=tmp_path, console=runs.quiet())
    assert stopped.layers == found.layers[:1]
    assert len(stopped.rounds) == 2  # the second was looked at, and did not lower the loss enough
    other = full(tiny)
    other = other.model_copy(update={"train": other.train.model_copy(update={"learning_rate": 0.02})})
    with pytest.raises(AssertionError, match="done already"):  # another rate is another training
        choose_layers(other, output=tmp_path, console=runs.quiet())


def test_a_layer_whose_training_fails_is_not_chosen(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    losses = {(0,): float("nan"), (1,): 0.5, (0, 1): None}
    monkeypatch.setattr(module, "trial", lambda _shared, recipe, *_: losses[recipe.layers])
    found = choose_layers(full(tiny), output=tmp_path, console=runs.quiet())
    assert found.layers == (1,)
    assert found.losses[-1] == 0.5


def test_what_cannot_be_chosen_from(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no target of this recipe lies in a numbered layer"):
        choose_layers(full(tiny).model_copy(update={"targets": "lm_head"}), output=tmp_path, console=runs.quiet())
    with pytest.raises(RecipeError, match="most=0 must be at least 1"):
        choose_layers(full(tiny), most=0, output=tmp_path, console=runs.quiet())
