"""Weights are learned by gradient through the sum: the loss falls, and the combination is what was learned."""

from __future__ import annotations

import pytest
import torch

import weft
from tests.common.language import llama
from weft.coefficients import Learn, learn_coefficients
from weft.combine import RuleError
from weft.data.rows import Example
from weft.differences import differences
from weft.errors import AdapterError
from weft.objectives import loss_of


class Tokenizer:
    pad_token_id = 0
    eos_token_id = 0


@pytest.fixture
def model():
    torch.manual_seed(0)
    found = llama()
    for seed, (name, method) in enumerate({"one": weft.LoRA(rank=2), "two": weft.VeRA(rank=4)}.items()):
        weft.attach(found, method, ["q_proj", "v_proj"], name=name, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in weft.parameters(found, name):
                p.add_(0.3 * torch.randn(p.shape, generator=draw))
    weft.attach(found, weft.DoRA(rank=2), "v_proj", name="dense", layers="0", seed=3)
    with torch.no_grad():
        for p in weft.parameters(found, "dense"):
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    weft.use(found, None)
    return found


def rows(count=6):
    draw = torch.Generator().manual_seed(1)
    from array import array

    ids = [torch.randint(1, 40, (9,), generator=draw).tolist() for _ in range(count)]
    return [Example(array("i", row), array("i", [-100, *row[1:]]), "x", i) for i, row in enumerate(ids)]


def loss(model, examples, kind="labels"):
    from weft.coefficients import _entropy
    from weft.data import collate

    with torch.no_grad():
        total, count, _ = (_entropy if kind == "entropy" else loss_of("causal-lm"))(
            model, collate(examples, pad_token=0)
        )
    return float(total / count)


@pytest.mark.parametrize("kind", ["labels", "entropy"])
@pytest.mark.parametrize("names", [("one", "two"), ("one", "two", "dense")])
def test_the_loss_falls_and_the_combination_has_it(model, kind, names) -> None:
    before = {key: p.detach().clone() for key, p in model.state_dict().items()}
    how = Learn(loss=kind, steps=12, learning_rate=0.03, batch_size=6)
    found = learn_coefficients(model, names, Tokenizer(), rows(), how)
    assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()
    assert found.losses[-1] < found.losses[0]
    weft.combine(model, dict.fromkeys(names, 0.3), name="start")
    weft.combine(model, found.weights, name="end")
    with weft.using(model, "start"):
        assert loss(model, rows(), kind) == pytest.approx(found.losses[0], abs=1e-5)
    with weft.using(model, "end"):
        assert loss(model, rows(), kind) == pytest.approx(found.losses[-1], abs=0.01)  # one more step was taken


def test_a_weight_for_each_adapter_is_the_same_everywhere_and_stays_in_bounds(model) -> None:
    how = Learn(by="adapter", steps=8, learning_rate=0.2, between=(0.1, 0.5))
    found = learn_coefficients(model, ["one", "two"], Tokenizer(), rows(), how)
    for by_site in found.weights.values():
        (only,) = set(by_site.values())
        assert 0.1 - 1e-6 <= only <= 0.5 + 1e-6
    assert set(found.weights["one"]) == set(differences(model, "one"))


def test_the_gradient_is_that_of_the_loss(model) -> None:
    examples, step, eps = rows(), 0.05, 1e-2
    how = Learn(by="adapter", steps=1, learning_rate=step, batch_size=6)
    found = learn_coefficients(model, ["one"], Tokenizer(), examples, how)
    values = []
    for sign in (1, -1):
        weft.combine(model, {"one": 0.3 + sign * eps}, name=f"at{sign}")
        with weft.using(model, f"at{sign}"):
            values.append(loss(model, examples))
    slope = (values[0] - values[1]) / (2 * eps)
    moved = next(iter(found.weights["one"].values())) - 0.3
    assert moved == pytest.approx(-step if slope > 0 else step, rel=1e-3)  # Adam's first step has the rate's size


def test_the_seed_chooses_the_rows(model) -> None:
    def learned(seed):
        return learn_coefficients(model, ["one"], Tokenizer(), rows(), Learn(steps=2, batch_size=2), seed=seed).losses

    assert learned(0) == learned(0) != learned(1)


@pytest.mark.parametrize(
    ("names", "how", "error", "said"),
    [
        (["on"], Learn(), AdapterError, "did you mean 'one'"),
        ([], Learn(), RuleError, "one adapter or more"),
        (["one"], Learn(steps=0), RuleError, "must be above 0"),
        (["one"], Learn(between=(0.5, 1.0)), RuleError, "does not lie between 0.5 and 1.0"),
    ],
)
def test_what_cannot_be_learned_is_said(model, names, how, error, said) -> None:
    with pytest.raises(error, match=said):
        learn_coefficients(model, names, Tokenizer(), rows(), how)


def test_weights_by_site_need_every_site(model) -> None:
    with pytest.raises(RuleError, match="the weights of one by site lack model"):
        weft.combine(model, {"one": {"model.layers.2.self_attn.q_proj": 1.0}}, name="both")
