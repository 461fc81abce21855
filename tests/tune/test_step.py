"""Levers of a step: alone and in pairs the same numbers, exact resuming, and what cannot go together."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

import weft
from tests.tune import runs
from weft.errors import WeftError
from weft.optim import flatten_state
from weft.recipe import Train
from weft.tune.activations import keep_activations, layers_of
from weft.tune.evaluate import pad_token
from weft.tune.in_backward import InBackward
from weft.tune.keeper import Keeper
from weft.tune.learn import make_learner
from weft.tune.loop import Progressed, train
from weft.tune.masters import in_float32
from weft.tune.parts import micro_batches
from weft.tune.random_state import seed_everything
from weft.tune.session import Session, attach_adapter, prepare
from weft.tune.step import Learner, StepResult, backpropagate, train_step

METHOD = {"name": "lora", "rank": 2, "dropout": 0.3}


def ready(tiny: Path, folder: Path, method: dict[str, Any] | None = None, **train: Any) -> tuple[Session, Learner]:
    recipe = runs.bare(tiny / "base", tiny / "data", folder, **{"clip_norm": None, "warmup": 0, **train})
    session = prepare(recipe.model_copy(update={"method": method or METHOD}), lambda text: None)
    attach_adapter(session)
    learner = make_learner(session)
    seed_everything(0)
    return session, learner


def finish(session: Session, learner: Learner, done: Progressed, until: int) -> list[StepResult]:
    results: list[StepResult] = []

    def after_step(result: StepResult) -> bool:
        results.append(result)
        return done.step < until

    train(
        learner, session.splits.train, session.recipe.train, done,
        pad_token=pad_token(session.tokenizer), after_step=after_step,
    )  # fmt: skip
    return results


def run(tiny: Path, folder: Path, **train: Any) -> tuple[list[StepResult], list[Tensor]]:
    """Three steps: what each gave, and the trained tensors and the optimiser's state after them."""
    session, learner = ready(tiny, folder, steps=3, **train)
    results = finish(session, learner, Progressed(), 3)
    state, _ = flatten_state(learner.optimizer, learner.parameters)
    for hook in learner.hooks:
        hook.remove()
    keep_activations(session.model)
    return results, [*(p.detach() for p in learner.parameters.values()), *state.values()]


SAME_BITS: dict[str, dict[str, Any]] = {
    "recompute": {"activations": "recompute"},
    "attention": {"activations": "attention"},
    "budget": {"activation_budget": "100kB"},
    "in backward": {"optimizer_in_backward": True},
}
NEAR: dict[str, dict[str, Any]] = {
    "chunk": {"loss_chunk": 5},
    "whole logits": {"loss_chunk": 0},
    "packing": {"packing": True},
    "padding": {"packing": False},
}
LEVERS = {**SAME_BITS, **NEAR}
PLAIN = {"loss_chunk": 0, "packing": False}


def pairs() -> list[tuple[str, str]]:
    """Every lever with itself and with every other of another key."""
    both = itertools.combinations_with_replacement(LEVERS, 2)
    alike = {"recompute", "attention", "budget"}
    return [(a, b) for a, b in both if a == b or not ({a, b} <= alike or LEVERS[a].keys() == LEVERS[b].keys())]


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tiny, tmp_path_factory.mktemp("plain") / "run", **PLAIN)


@pytest.mark.parametrize("pair", pairs(), ids=" + ".join)
def test_alone_and_in_pairs_the_numbers_are_the_same(tiny, tmp_path, plain, pair):
    """To the bit where the arithmetic is the same; dropout draws other numbers for packed rows, so it is off there."""
    found = run(tiny, tmp_path / "run", **{**PLAIN, **LEVERS[pair[0]], **LEVERS[pair[1]]})
    exact = set(pair) <= {*SAME_BITS, "whole logits", "padding"}
    if "packing" in pair:
        assert all(r.loss < 2 * p.loss for r, p in zip(found[0], plain[0], strict=True))
        return
    for result, expected in zip(found[0], plain[0], strict=True):
        assert result.loss == (expected.loss if exact else pytest.approx(expected.loss, rel=1e-6))
        near = pytest.approx(expected.gradient_norm, rel=1e-6 if exact else 1e-5)
        assert result.gradient_norm == near
    for tensor, expected in zip(found[1], plain[1], strict=True):
        if exact:
            assert torch.equal(tensor, expected)
        else:
            torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-5)


def test_packed_rows_learn_what_padded_ones_do(tiny, tmp_path):
    still = {"name": "lora", "rank": 2}
    losses = {}
    for packing, lever in itertools.product((False, True), ({}, *SAME_BITS.values())):
        session, learner = ready(tiny, tmp_path / "run", still, steps=3, packing=packing, **lever)
        losses[packing, str(lever)] = [r.loss for r in finish(session, learner, Progressed(), 3)]
    first = losses[False, "{}"]
    for found in losses.values():
        assert found == pytest.approx(first, rel=1e-5)


METHODS = [
    {"name": "lora", "rank": 2, "dropout": 0.3}, {"name": "dora", "rank": 2}, {"name": "vera", "rank": 4},
    {"name": "ia3"}, {"name": "oft", "block_size": 4}, {"name": "prefix", "num_tokens": 2}, {"name": "full"},
    {"name": "prompt", "num_tokens": 2}, {"name": "bottleneck"}, {"name": "shira", "rank": 2}, {"name": "norm_tuning"},
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["name"])
def test_stepping_in_the_backward_is_stepping_after_it(tiny, tmp_path, method):
    """To the bit, whatever tensors of a method are read by several layers or in several places."""
    found = {}
    for inside in (False, True):
        session, learner = ready(tiny, tmp_path / "run", method, steps=2, optimizer_in_backward=inside)
        results = finish(session, learner, Progressed(), 2)
        assert all(p.grad is None for p in learner.parameters.values())
        found[inside] = [r.loss for r in results], [p.detach() for p in learner.parameters.values()]
        norms = [r.gradient_norm for r in results]
        assert norms == pytest.approx(found.setdefault("norms", norms), rel=1e-6)
    assert found[True][0] == found[False][0]
    assert all(torch.equal(a, b) for a, b in zip(found[True][1], found[False][1], strict=True))


def test_gradients_are_gone_before_the_next_ones_come(tiny, tmp_path):
    session, learner = ready(tiny, tmp_path / "run", optimizer_in_backward=True)
    alive: list[int] = []
    for p in learner.parameters.values():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in learner.parameters.values()))
        )
    session.model.train()
    parts = micro_batches(session.splits.train.examples[:2], size=2, pad_token=1)
    train_step(learner, parts, session.recipe.train, rate=1e-3, step=1)
    assert len(alive) == len(learner.parameters)
    assert max(alive) == 0
    for hook in learner.hooks:
        hook.remove()
    train_step(learner, parts, Train(clip_norm=None), rate=1e-3, step=2)
    assert max(alive) == len(learner.parameters)


def test_a_loss_that_is_not_a_number_stops_before_the_backward_steps(tiny, tmp_path):
    session, learner = ready(tiny, tmp_path / "run", optimizer_in_backward=True)
    before, loss_of = [p.detach().clone() for p in learner.parameters.values()], learner.loss_of
    learner.loss_of = lambda model, batch: (loss_of(model, batch)[0] * float("nan"), batch.num_trained, {})
    parts = micro_batches(session.splits.train.examples[:2], size=2, pad_token=1)
    with pytest.raises(WeftError, match="loss of step 7 is nan"):
        train_step(learner, parts, session.recipe.train, rate=1.0, step=7)
    assert all(torch.equal(p, q) for p, q in zip(learner.parameters.values(), before, strict=True))


def test_a_second_batch_in_one_step_is_refused(tiny, tmp_path):
    session, learner = ready(tiny, tmp_path / "run", optimizer_in_backward=True)
    parts = micro_batches(session.splits.train.examples[:4], size=2, pad_token=1)
    with pytest.raises(WeftError, match="a second batch came before the step was over"):
        train_step(learner, parts, session.recipe.train, rate=1e-3, step=1)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"optimizer_in_backward": True}, "clip_norm needs all of them"),
        ({"optimizer_in_backward": True, "clip_norm": None, "accumulate": 2}, "set accumulate to 1"),
        ({"optimizer_in_backward": True, "clip_norm": None, "precision": "float16"}, "use bfloat16"),
        ({"activation_budget": "2 apples"}, "is no size"),
        ({"activation_budget": "2GB", "activations": "recompute"}, "leave activations out"),
        ({"master_weights": True}, "float32 already"),
        ({"adapter_dtype": "float16"}, "set master_weights to true"),
        ({"loss_chunk": -1}, "greater than or equal to 0"),
        ({"gradient_checkpointing": True}, "Extra inputs are not permitted"),
    ],
)
def test_what_does_not_go_together_is_refused(keys: dict[str, Any], why: str):
    with pytest.raises(ValidationError, match=why):
        Train(**keys)


def test_several_processes_do_not_step_in_the_backward(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(WeftError, match="gradients of the other processes"):
        InBackward(torch.optim.SGD([nn.Parameter(torch.ones(1))]), {}, masters=False)


RESUMED = {
    **SAME_BITS, **NEAR,
    "low": {"adapter_dtype": "bfloat16"},
    "masters": {"adapter_dtype": "bfloat16", "master_weights": True},
    "half": {"adapter_dtype": "float16", "master_weights": True, "precision": "float16"},
    "all": {
        "adapter_dtype": "bfloat16", "master_weights": True, "optimizer_in_backward": True, "loss_chunk": 5,
        "activation_budget": "100kB",
    },
}  # fmt: skip


@pytest.mark.parametrize("lever", RESUMED)
def test_resuming_is_exact(tiny, tmp_path, lever):
    """Six steps, and three, a checkpoint, a fresh start and three more: the same bits."""
    session, learner = ready(tiny, tmp_path / "whole", steps=6, **RESUMED[lever])
    finish(session, learner, Progressed(), 6)
    expected = [p.detach().clone() for p in learner.parameters.values()]

    keeper, done = Keeper(tmp_path / "checkpoints", 2, "half"), Progressed()
    session, learner = ready(tiny, tmp_path / "half", steps=6, **RESUMED[lever])
    finish(session, learner, done, 3)
    keeper.save(learner, done)
    session, learner = ready(tiny, tmp_path / "half", steps=6, **RESUMED[lever])
    from weft.tune import checkpoint

    found, _, _ = checkpoint.newest(keeper.folder)
    assert found is not None
    finish(session, learner, keeper.restore(found, learner), 6)
    assert all(torch.equal(p, q) for p, q in zip(learner.parameters.values(), expected, strict=True))


def test_masters_add_up_steps_that_low_precision_loses():
    """bfloat16 has 8 bits: 256 steps of 1/1024 from 1 move nothing without float32 copies, and 1/4 with them."""
    moved = {}
    for masters in (False, True):
        p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = torch.optim.SGD([p], lr=2.0**-10)
        for _ in range(256):
            p.grad = torch.ones_like(p)
            if masters:
                with in_float32(optimizer):
                    assert p.dtype == p.grad.dtype == torch.float32
                    optimizer.step()
            else:
                optimizer.step()
        moved[masters] = 1 - p[0].item()
        assert p.dtype == torch.bfloat16
        assert optimizer.state[p].get("master") is not None or not masters
    assert moved == {False: 0.0, True: 0.25}


def test_masters_are_what_float32_would_have_learnt_rounded(tiny, tmp_path):
    """The first step is the same but for the rounding of the gradient's inputs; the tensors are the masters rounded."""
    session, learner = ready(tiny, tmp_path / "run", steps=3, adapter_dtype="bfloat16", master_weights=True)
    assert {p.dtype for p in learner.parameters.values()} == {torch.bfloat16}
    finish(session, learner, Progressed(), 3)
    states = [learner.optimizer.state[p] for p in learner.parameters.values()]
    assert all(s["master"].dtype == s["exp_avg"].dtype == torch.float32 for s in states)
    for p, state in zip(learner.parameters.values(), states, strict=True):
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, state["master"].bfloat16())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["name"])
def test_every_method_trains_in_bfloat16(tiny, tmp_path, method):
    session, learner = ready(tiny, tmp_path / "run", method, steps=2, adapter_dtype="bfloat16")
    assert {p.dtype for p in learner.parameters.values()} == {torch.bfloat16}
    results = finish(session, learner, Progressed(), 2)
    assert all(r.gradient_norm > 0 for r in results)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, 9)), drawn=st.randoms(use_true_random=False))
def test_any_split_into_parts_gives_the_same_gradient(accumulating, cuts: set[int], drawn: Any):
    """Uneven rows with uneven numbers of trained tokens, in any order and cut anywhere."""
    session, learner, expected = accumulating
    rows = list(session.splits.train.examples[:10])
    drawn.shuffle(rows)
    edges = [0, *sorted(cuts), 10]
    parts = [micro_batches(rows[a:b], size=b - a, pad_token=1)[0] for a, b in itertools.pairwise(edges)]
    total = backpropagate(learner, parts, session.recipe.train)
    assert total == pytest.approx(expected[0], rel=1e-6)
    for p, gradient in zip(learner.parameters.values(), expected[1], strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, gradient, rtol=0, atol=1e-6 * max(1.0, float(gradient.abs().max())))
        p.grad = None


@pytest.fixture(scope="module")
def accumulating(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    session, learner = ready(tiny, tmp_path_factory.mktemp("parts") / "run", {"name": "lora", "rank": 2})
    parts = micro_batches(session.splits.train.examples[:10], size=10, pad_token=1)
    with torch.no_grad():
        for p in learner.parameters.values():
            p.add_(torch.randn_like(p) * 0.1)
    total = backpropagate(learner, parts, session.recipe.train)
    gradients = [p.grad.clone() for p in learner.parameters.values() if p.grad is not None]
    for p in learner.parameters.values():
        p.grad = None
    return session, learner, (total, gradients)


def test_levers_leave_no_trace(tiny, tmp_path):
    recipe = runs.bare(
        tiny / "base", tiny / "data", tmp_path / "run", steps=2, clip_norm=None, activations="recompute",
        optimizer_in_backward=True,
    )  # fmt: skip
    from weft.tune import run as run_module
    from weft.tune import tune

    kept: list[Session] = []
    plain_prepare = run_module.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "prepare", lambda *a: kept.append(plain_prepare(*a)) or kept[-1])
        tune(recipe, console=runs.quiet())
    model = kept[0].model
    assert not any("gradient_checkpointing" in layer.__dict__ for layer in layers_of(model))
    before = [p.detach().clone() for p in weft.parameters(model)]
    ids = torch.arange(6).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.equal(p, q) for p, q in zip(weft.parameters(model), before, strict=True))
    assert all(p.grad is not None for p in weft.parameters(model))
