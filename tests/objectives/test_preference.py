"""Every preference loss against its equation, written out token by token; packed with a shared prompt, and padded."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import weft
from weft import objectives
from weft.data import Batch, Example, collate
from weft.data.pack import concatenate
from weft.data.rows import IGNORED
from weft.errors import WeftError
from weft.objectives.preference import Answers, preference_loss
from weft.recipe.schema import Preference, Recipe
from weft.tune.packing import packed_attention, why_not_packed

TOLERANCE = 5e-5
"""Largest difference of a gradient, relative to its largest entry; float32. Measured: below 3e-5, for orpo."""


def pair(prompt: int, chosen: int, rejected: int, number: int) -> Example:
    ids = array("i", [(7 * number + 3 * k + k * k) % 97 + 2 for k in range(prompt + chosen + rejected)])
    labels = array("i", [IGNORED] * prompt + list(ids[prompt:]))
    return Example(ids, labels, "f", number, shared=prompt, rejected=prompt + chosen)


PAIRS = [pair(6, 4, 7, 0), pair(1, 3, 2, 1), pair(12, 9, 1, 2), pair(5, 1, 5, 3)]
OPTIONS = [
    Preference(),
    Preference(beta=0.5, label_smoothing=0.2),
    Preference(loss="ipo"),
    Preference(loss="simpo"),
    Preference(loss="simpo", beta=1.5, gamma=0.2),
    Preference(loss="orpo"),
]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    built = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in built.parameters():
            p.mul_(3)
    weft.attach(built, weft.LoRA(rank=4), "all-linear", name="a")
    with torch.no_grad():
        for p in weft.parameters(built):
            p.add_(0.1 * torch.randn_like(p))
    return built


def by_hand(model: Any, options: Preference) -> Tensor:
    """The sum over pairs, one answer after another, one token after another."""
    total = torch.zeros(())
    beta = options.beta or {"simpo": 2.0}.get(options.loss, 0.1)
    for example in PAIRS:
        log_p, mean = {}, {}
        for route in ("a", None):
            with weft.using(model, route), torch.set_grad_enabled(route is not None):
                for which, answer in zip("wl", example.answers(), strict=True):
                    ids = torch.tensor([list(answer.input_ids)])
                    each = model(input_ids=ids).logits[0].log_softmax(-1)
                    places = range(example.shared, ids.shape[1])
                    log_p[which, route] = torch.stack([each[t - 1, ids[0, t]] for t in places]).sum()
                    if route is not None:
                        mean[which] = log_p[which, route] / len(places)
        h = (log_p["w", "a"] - log_p["w", None]) - (log_p["l", "a"] - log_p["l", None])
        if options.loss == "sigmoid":
            right, wrong = torch.sigmoid(beta * h).log(), torch.sigmoid(-beta * h).log()
            total = total - (1 - options.label_smoothing) * right - options.label_smoothing * wrong
        elif options.loss == "ipo":
            total = total + (h - 1 / (2 * beta)) ** 2
        elif options.loss == "simpo":
            gamma = 1.0 if options.gamma is None else options.gamma
            total = total - torch.sigmoid(beta * mean["w"] - beta * mean["l"] - gamma).log()
        else:
            odds = {which: mean[which].exp() / (1 - mean[which].exp()) for which in "wl"}
            total = total - mean["w"] - beta * torch.sigmoid((odds["w"] / odds["l"]).log()).log()
    return total


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, weft.parameters(model)))


def batches() -> dict[str, Batch]:
    return {"padded": collate(PAIRS, pad_token=0), "packed": concatenate(PAIRS)}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_and_its_gradients_are_the_equations(model: Any, options: Preference) -> None:
    expected = by_hand(model, options)
    wanted = gradients(model, expected)
    for batch in batches().values():
        for chunk in (0, 3, None):  # all logits at once; in pieces; in pieces of a size that is chosen
            loss_of, said = objectives.chunked_loss_of("preference", model, chunk=chunk, preference=options)
            with packed_attention(model):
                loss, count, metrics = loss_of(model, batch)
                found = gradients(model, loss)
            assert said is None
            assert count == batch.num_trained == len(PAIRS)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
            assert 0 <= metrics["correct"] <= count
            for a, b in zip(wanted, found, strict=True):
                assert (a - b).abs().max() <= TOLERANCE * a.abs().max()


def test_a_shared_prompt_is_read_once(model: Any) -> None:
    assert why_not_packed(model, longest=30, causal=True) is None
    padded, packed = batches()["padded"], batches()["packed"]
    assert packed.input_ids.numel() == sum(len(e.input_ids) for e in PAIRS) == 56
    assert padded.input_ids.shape == (8, 21)
    assert padded.num_tokens == packed.num_tokens


def test_the_rejected_answer_does_not_see_the_chosen_one(model: Any) -> None:
    other = [pair(6, 4, 7, 0), *PAIRS[1:]]
    other[0].input_ids[6:10] = array("i", [50, 51, 52, 53])
    with packed_attention(model), torch.no_grad():
        one, two = (model(**concatenate(rows).inputs()).logits for rows in (PAIRS, other))
    assert one[:, 10:].equal(two[:, 10:])
    assert not one[:, 6:10].allclose(two[:, 6:10])


def test_the_base_is_the_reference_and_nothing_is_left_changed() -> None:
    """With dropout: the reference is without it, what is trained is with it."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).train()
    weft.attach(model, weft.LoRA(rank=4), "all-linear", name="a")
    flags = [p.requires_grad for p in model.parameters()]
    losses = set()
    for _ in range(2):
        loss, _, metrics = objectives.get("preference").loss(model, batches()["padded"])
        losses.add(loss.item())
    assert len(losses) == 2
    assert flags == [p.requires_grad for p in model.parameters()]
    assert model.training
    assert {m.training for m in model.modules()} == {True}
    assert model.__dict__["weave"].route == "a"
    model.eval()  # a new adapter is its own reference: no margin, and every pair is a tie
    loss, count, metrics = objectives.get("preference").loss(model, batches()["padded"])
    assert loss.item() == pytest.approx(count * torch.tensor(2.0).log().item(), rel=1e-6)
    assert (metrics["margin"].item(), metrics["correct"].item()) == (0.0, count / 2)


def test_without_adapters_the_model_is_its_own_reference(model: Any) -> None:
    weft.detach(model)
    loss, count, _ = objectives.get("preference").loss(model, batches()["padded"])
    assert loss.item() == pytest.approx(count * torch.tensor(2.0).log().item(), rel=1e-6)


def test_what_is_counted() -> None:
    answers = Answers(torch.tensor([-1.0, -2.0, -3.0, -1.0, -2.0, -2.0]), torch.tensor([1, 1, 1, 1, 1, 1]))
    _, count, metrics = preference_loss(answers, torch.zeros(6), Preference())
    assert (count, metrics["correct"].item()) == (3, 1.5)
    assert metrics["margin"].item() == pytest.approx(0.1 * (1 - 2 + 0))


def test_log_sigmoid_holds_for_large_margins() -> None:
    answers = Answers(torch.tensor([-1e4, 0.0]), torch.tensor([1, 1]))
    loss, _, _ = preference_loss(answers, torch.zeros(2), Preference(beta=1.0))
    assert loss.item() == pytest.approx(1e4)
    sure = Answers(torch.tensor([0.0, -5.0]), torch.tensor([3, 3]))
    loss, _, _ = preference_loss(sure, None, Preference(loss="orpo"))
    assert loss.isfinite()


def test_options_that_a_loss_does_not_know_are_refused() -> None:
    for options, why in (
        ({"gamma": 1.0}, "sigmoid has no such margin"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "ipo has none"),
        ({"loss": "dpo"}, "sigmoid"),
        ({"beta": 0.0}, "greater than 0"),
    ):
        with pytest.raises(ValidationError, match=why):
            Preference.model_validate(options)
    with pytest.raises(ValidationError, match="the section preference is for task: preference"):
        Recipe.model_validate({"data": {"train": "x"}, "preference": {"beta": 0.2}})
    with pytest.raises(WeftError, match="no objective is named"):
        objectives.get("dpo")
