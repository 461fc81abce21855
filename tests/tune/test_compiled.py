"""A compiled run learns what an uncompiled one does, and says how many graphs it took."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch

from tests.tune import runs
from weft.tune import tune
from weft.tune.compiled import Compilations


def test_graphs_breaks_and_recompilations_are_counted() -> None:
    torch._dynamo.reset()
    counted = Compilations()

    def broken(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    plain = torch.compile(lambda x: x.sin() + 1, backend="eager")
    for length in (3, 3, 4, 5):  # the second length compiles it for any
        plain(torch.ones(length))
    assert counted.as_dict() == {"graphs": 2, "graph_breaks": 0, "recompilations": 1}
    torch.compile(broken, backend="eager")(torch.ones(3))
    assert counted.as_dict() == {"graphs": 4, "graph_breaks": 1, "recompilations": 1}
    assert str(counted) == "compiled: graphs 4, recompilations 1, graph breaks 1"
    counted.close()
    plain(torch.ones(3, 3))
    assert counted.as_dict()["recompilations"] == 1


@pytest.mark.slow
def test_compile_is_a_key_of_a_run(tiny: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With recomputed layers, torch's own graph capture and no code generation, which would take a minute here."""
    losses, learnt = {}, {}
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for compiled in (False, True):
        torch._dynamo.reset()
        recipe = runs.bare(
            tiny / "base", tiny / "data", tmp_path / str(compiled), steps=3, packing=False, log_every=1,
            evaluate_every=2, compile=compiled, activations="recompute",
        ).model_copy(update={"method": {"name": "lora", "rank": 2}})  # fmt: skip
        data = recipe.data.model_copy(update={"validation": recipe.data.train})
        recipe = recipe.model_copy(update={"data": data})
        tune(recipe, console=runs.quiet())
        folder = tmp_path / str(compiled)
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses[compiled] = [record["loss"] for record in log if record["event"] == "train"]
        learnt[compiled] = [record["loss"] for record in log if record["event"] == "validation"]
        counted = json.loads((folder / "result.json").read_text())["compiled"]
        if not compiled:
            assert counted is None
        else:
            assert counted["graphs"] >= 1
            assert counted["recompilations"] <= 2  # batches of other widths are compiled for once
            assert counted["graph_breaks"] == 0
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert len(set(learnt[True])) == 3  # before, between and after: what was measured before is not used again
    assert learnt[True] == pytest.approx(learnt[False], rel=1e-5)
