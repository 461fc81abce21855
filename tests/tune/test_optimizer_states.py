"""What `weft plan` says that an optimiser keeps is what it keeps after a step, for every name there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.optim.problems import MATRICES_ONLY, give_gradients, names
from tests.tune import runs
from weft.optim import held_bytes
from weft.plan.trace import Trace
from weft.recipe import Recipe
from weft.tune.ahead import sampled
from weft.tune.evaluate import pad_token
from weft.tune.learn import make_learner
from weft.tune.parts import micro_batches
from weft.tune.session import attach_adapter, prepare
from weft.tune.skeleton import skeleton
from weft.tune.trained import trained_tensors

OPTIONS: dict[str, dict[str, Any]] = {"lisa": {"layers": 1}, "natural-galore": {"history": 2}}


def recipe(tiny: Path, name: str) -> Recipe:
    spec = {"name": name, **OPTIONS.get(name, {})}
    made = runs.bare(tiny / "base", tiny / "data", tiny / "out", packing=False, optimizer=spec)
    method = {"name": "full"} if name in MATRICES_ONLY else {"name": "lora", "rank": 8}
    return made.model_copy(update={"method": method, "targets": ["q_proj", "down_proj"]})


def said(wanted: Recipe) -> int:
    """Of a trace of one short batch."""
    tokenizer, splits, _ = sampled(wanted)
    bones = skeleton(wanted, tokenizer, splits)
    (batch,) = micro_batches(splits.train.examples[:1], size=1, pad_token=pad_token(tokenizer))
    trace: Trace = bones.trace(batch, held=False)
    return sum(stored.size for stored in trace.stored if stored.kind == "optimizer")


def real(wanted: Recipe) -> int:
    """Of the run's own optimiser after a step on gradients that are given."""
    session = prepare(wanted, lambda text: None)
    attach_adapter(session)
    learner = make_learner(session)
    give_gradients(list(trained_tensors(session.model, session.name).trained), 0)
    if hasattr(learner.optimizer, "seeds"):
        for seed in learner.optimizer.seeds():
            learner.optimizer.tell(seed, 0.5)
    learner.optimizer.step()
    return held_bytes(learner.optimizer)


@pytest.mark.parametrize("name", names())
def test_the_forecast_of_an_optimiser_is_what_it_keeps(tiny: Path, name: str) -> None:
    wanted = recipe(tiny, name)
    assert said(wanted) == real(wanted)


@pytest.mark.parametrize("name", ["apollo", "fira", "galore"])
def test_a_subspace_is_no_larger_than_the_matrix(tiny: Path, name: str) -> None:
    """The default rank of 128 is for whole weights: for factors of 8 it would take up to 32 times their size."""
    wanted = recipe(tiny, name)
    assert real(wanted) <= 1.5 * real(recipe(tiny, "adamw"))
