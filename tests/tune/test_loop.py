"""The loop: exact accumulation, precisions, clipping, and a loss that is not a number."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tune import runs
from weft import parameters
from weft.data import Batch
from weft.errors import WeftError
from weft.recipe import Train
from weft.tune.evaluate import measure, pad_token
from weft.tune.learn import make_learner
from weft.tune.loop import Progressed, num_steps, train
from weft.tune.parts import micro_batches
from weft.tune.session import Session, attach_adapter, prepare
from weft.tune.step import Learner, StepResult, train_step


def ready(tiny, tmp_path, **settings) -> tuple[Session, Learner]:
    recipe = runs.bare(tiny / "base", tiny / "data", tmp_path / "out", **settings)
    recipe = recipe.model_copy(update={"method": {"name": "lora", "rank": 2}})
    session = prepare(recipe, lambda text: None)
    attach_adapter(session)
    return session, make_learner(session)


@pytest.mark.parametrize(("method", "kinds"), [("lora", {"linear"}), ("prompt", {"input"}), ("prefix", {"attention"})])
def test_without_targets_a_method_adapts_what_it_is_for(tiny, tmp_path, method, kinds):
    recipe = runs.bare(tiny / "base", tiny / "data", tmp_path / "out").model_copy(update={"method": {"name": method}})
    assert recipe.targets is None
    session = prepare(recipe, lambda text: None)
    assert {planned.site.kind for planned in session.plan.sites} == kinds


def trained(tiny, tmp_path, **settings) -> tuple[Session, list[StepResult]]:
    session, learner = ready(tiny, tmp_path, **settings)
    results: list[StepResult] = []

    def after_step(result: StepResult) -> bool:
        results.append(result)
        return True

    train(
        learner, session.splits.train, session.recipe.train, Progressed(),
        pad_token=pad_token(session.tokenizer), after_step=after_step,
    )  # fmt: skip
    return session, results


@pytest.mark.parametrize("by_length", [False, True])
def test_accumulation_is_exact_for_uneven_rows_and_across_epochs(tiny, tmp_path, by_length):
    """30 rows in steps of 8: the fourth step is a short one, and the rows have uneven numbers of trained tokens."""
    whole, at_once = trained(tiny, tmp_path, steps=6, batch_size=8, bucket_by_length=by_length)
    parts, in_four = trained(tiny, tmp_path, steps=6, batch_size=2, accumulate=4, bucket_by_length=by_length)
    assert len({len(e.input_ids) for e in whole.splits.train.examples}) > 3
    assert [r.num_trained for r in at_once] == [r.num_trained for r in in_four]
    assert len({r.num_trained for r in at_once}) > 1
    for a, b in zip(at_once, in_four, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-4)
    for p, q in zip(parameters(whole.model), parameters(parts.model), strict=True):
        # where a gradient is next to nothing, Adam's step is its rounding
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_training_learns_and_leaves_the_base_alone(tiny, tmp_path):
    session, _ = ready(tiny, tmp_path)
    untouched = {k: v.clone() for k, v in session.model.state_dict().items() if "adapters" not in k}
    before = measure(session.model, session.tokenizer, session.splits.train.examples)
    session, results = trained(tiny, tmp_path, steps=40, learning_rate=0.1)
    after = measure(session.model, session.tokenizer, session.splits.train.examples)
    assert after["loss"] < before["loss"] - 0.1
    assert results[-1].loss < results[0].loss
    assert all(torch.equal(v, session.model.state_dict()[k]) for k, v in untouched.items())


@pytest.mark.parametrize("settings", [{"activations": "recompute"}, {"precision": "bfloat16"}, {"optimizer": "sgd"}])
def test_other_ways_to_compute_learn_the_same_thing(tiny, tmp_path, settings):
    _, plain = trained(tiny, tmp_path, steps=3)
    _, other = trained(tiny, tmp_path, steps=3, **settings)
    assert other[0].loss == pytest.approx(plain[0].loss, rel=2e-2)
    if settings == {"activations": "recompute"}:
        assert [r.loss for r in other] == pytest.approx([r.loss for r in plain], rel=1e-6)


def test_float16_scales_the_loss_and_skips_steps_that_overflow(tiny, tmp_path):
    session, learner = ready(tiny, tmp_path, precision="float16", steps=8)
    before = [p.clone() for p in parameters(session.model)]
    examples = session.splits.train.examples[:4]
    for step in range(8):  # the first scales overflow float16 and are halved
        parts = micro_batches(examples, size=4, pad_token=1)
        result = train_step(learner, parts, session.recipe.train, rate=1e-2, step=step)
        assert math.isfinite(result.loss)
    assert learner.scaler.get_scale() < 2.0**16 or any(
        not torch.equal(p, q) for p, q in zip(before, parameters(session.model), strict=True)
    )


def test_clipping_bounds_the_update_and_null_means_none(tiny, tmp_path):
    norms = {}
    for clip in (1e-3, None):
        session, learner = ready(tiny, tmp_path, clip_norm=clip, optimizer="sgd", betas=(0.0, 0.9))
        before = [p.detach().clone() for p in parameters(session.model)]
        parts = micro_batches(session.splits.train.examples[:4], size=4, pad_token=1)
        result = train_step(learner, parts, session.recipe.train, rate=1.0, step=1)
        moved = (
            sum((p - q).square().sum().item() for p, q in zip(parameters(session.model), before, strict=True)) ** 0.5
        )
        norms[clip] = (result.gradient_norm, moved)
    assert norms[1e-3][1] == pytest.approx(1e-3, rel=1e-3)
    assert norms[None][1] == pytest.approx(norms[None][0], rel=1e-4)
    assert norms[None][0] == pytest.approx(norms[1e-3][0], rel=1e-6)


def test_vectors_are_not_decayed(tiny, tmp_path):
    _, learner = ready(tiny, tmp_path, weight_decay=0.5)
    vector = torch.nn.Parameter(torch.ones(3))
    from weft.tune.optimizers import make_optimizer

    groups = make_optimizer({**learner.parameters, "v": vector}, Train(weight_decay=0.5)).param_groups
    assert {g["weight_decay"]: {p.ndim for p in g["params"]} for g in groups} == {0.5: {2}, 0.0: {1}}


def test_a_loss_that_is_not_a_number_stops_before_anything_changes(tiny, tmp_path):
    session, learner = ready(tiny, tmp_path)
    before = [p.clone() for p in parameters(session.model)]
    loss_of = learner.loss_of

    def broken(model, batch: Batch):
        loss, count, metrics = loss_of(model, batch)
        return loss * float("nan"), count, metrics

    learner.loss_of = broken
    with pytest.raises(WeftError, match="loss of step 7 is nan"):
        train_step(learner, micro_batches(session.splits.train.examples[:2], size=2, pad_token=1),
                   session.recipe.train, rate=1.0, step=7)  # fmt: skip
    assert all(torch.equal(p, q) for p, q in zip(before, parameters(session.model), strict=True))
    assert all(p.grad is None for p in parameters(session.model))


def test_number_of_steps():
    assert num_steps(Train(steps=5), 100) == 5
    assert num_steps(Train(batch_size=8), 30) == 4
    assert num_steps(Train(batch_size=4, accumulate=2, epochs=2), 30) == 8
    assert num_steps(Train(batch_size=8, epochs=0.5), 30) == 2
    assert num_steps(Train(batch_size=8, epochs=0.01), 30) == 1
