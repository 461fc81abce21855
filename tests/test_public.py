"""The `weft` namespace: light to import, complete, and a function wherever a room has a function's name."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import weft


def test_importing_weft_imports_nothing_heavy() -> None:
    program = "import weft, sys; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "numpy", "pydantic"} & set(loaded)


@pytest.mark.parametrize("name", weft.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(weft, name)
    assert value is getattr(weft, name)
    assert name == "__version__" or value.__doc__


@pytest.mark.parametrize("room", ["attach", "parity", "tune", "cost", "methods"])
def test_a_room_does_not_hide_the_function_of_its_name(room: str) -> None:
    importlib.import_module(f"weft.{room}")
    assert callable(getattr(weft, room))


def test_every_method_is_a_public_name() -> None:
    for cls in weft.methods().values():
        if cls.__module__.startswith("weft.methods."):
            assert getattr(weft, cls.__name__) is cls


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LoRAA'"):
        _ = weft.LoRAA


def test_the_example_of_the_readme_in_short() -> None:
    """The calls that every page is made of, under the names that they have there."""
    model, tokenizer = weft.load_base("pico")
    plan = weft.attach(model, weft.LoRA(rank=2), targets="attention", layers="0", name="math")
    assert plan.num_parameters == weft.cost(model, weft.LoRA(rank=2), targets="attention").parameters // 6
    weft.attach(model, weft.LoRA(rank=2), targets="attention", layers="0", name="code")
    ids = tokenizer(["def f(x):", "def g(y):"], return_tensors="pt").input_ids
    weft.use(model, {"math": 0.7, "code": 0.3})
    weft.use(model, ["math", None])
    model(ids)
    assert weft.parity(model, "math", {"input_ids": ids}, ways=("merged",)).passed
    weft.merge(model, "math")
    weft.unmerge(model)
    weft.detach(model)
    assert Path(weft.__file__).name == "__init__.py"
