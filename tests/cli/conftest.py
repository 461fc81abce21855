"""One short run on pico that every command works on, and a way to run commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from weft.cli.main import main

DATA = Path(__file__).resolve().parents[2] / "examples" / "data" / "docstrings"
RECIPE = """
base: pico
data: {{train: {train}, validation: {validation}, limit: 24}}
method: {{name: lora, rank: 2}}
targets: all-linear
layers: 0-3
train: {{steps: 3, batch_size: 2, learning_rate: 0.03, warmup: 0, threads: 1}}
forgetting: {{limit: 2}}
check: {{ways: [saved, merged], rows: 2}}
report: {{examples: 1, forecast: false}}
output: {output}
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def weft(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def run(*arguments: Any) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    text = RECIPE.format(
        train=DATA / "train.jsonl", validation=DATA / "validation.jsonl", output=folder / "runs" / "short"
    )
    (folder / "short.yaml").write_text(text)
    return folder / "short.yaml"


@pytest.fixture(scope="session")
def adapter(recipe: Path) -> Path:
    """The folder of a finished run."""
    assert main(["tune", str(recipe)]) == 0
    return recipe.parent / "runs" / "short"
