"""The estimate against what a step really allocates, counted by torch itself."""

from __future__ import annotations

from array import array

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from weft import objectives
from weft.data import IGNORED, Example
from weft.recipe import Train
from weft.tune.activations import recompute_activations
from weft.tune.estimate import estimate
from weft.tune.keeper import named_parameters
from weft.tune.loop import Learner, make_scaler, micro_batches, train_step
from weft.tune.optimizers import make_optimizer


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows(length: int, count: int = 4) -> list[Example]:
    ids = array("i", [i % 400 for i in range(length)])
    labels = array("i", [IGNORED] * (length // 2) + list(ids[length // 2 :]))
    return [Example(ids, labels, "made", i) for i in range(count)]


def peak_bytes(learner: Learner, settings: Train, examples: list[Example]) -> int:
    """The highest sum of what a step allocated and had not yet given back."""
    parts = micro_batches(examples, size=settings.batch_size, pad_token=0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        train_step(learner, parts, settings, rate=1e-3, step=1)
    held = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("length", [96, 400])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_within_a_factor_of_what_a_step_allocates(length, checkpointing):
    base, settings = model(), Train(batch_size=4, gradient_checkpointing=checkpointing)
    weft.attach(base, weft.LoRA(rank=4), name="a")
    trained = named_parameters(base, "a")
    optimizer = make_optimizer(trained, settings)
    learner = Learner(
        base, trained, optimizer, make_scaler(torch.device("cpu"), None), objectives.get("causal-lm").loss
    )
    base.train()
    needed = estimate(base, rows(length), settings, task="causal-lm", pad_token=0, name="a")
    if checkpointing:
        recompute_activations(base)
    real = peak_bytes(learner, settings, rows(length))
    transient = needed.total_bytes - needed.weights_bytes - needed.adapter_bytes
    assert 0.7 < transient / real < 1.6


def test_what_can_be_counted_is_counted():
    base = model()
    weights = sum(p.numel() * 4 for p in base.parameters())
    plan = weft.attach(base, weft.LoRA(rank=4), name="a")
    random = torch.get_rng_state()
    base.eval()
    needed = estimate(base, rows(32), Train(batch_size=2), task="causal-lm", pad_token=0, name="a")
    assert needed.adapter_bytes == needed.gradient_bytes == plan.num_parameters * 4
    assert needed.optimizer_bytes == 2 * needed.adapter_bytes
    assert weights <= needed.weights_bytes <= weights * 1.01  # and the rotary tables
    assert needed.num_tokens == 64
    assert not base.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in base.parameters())
    sgd = estimate(base, rows(32), Train(batch_size=4, optimizer="sgd"), task="causal-lm", pad_token=0, name="a")
    assert sgd.optimizer_bytes == sgd.adapter_bytes
    assert sgd.activation_bytes == 2 * needed.activation_bytes
