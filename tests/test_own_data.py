"""Rules that weigh adapters by their own data: the statistics are those of the adapted model, and the sums theirs."""

from __future__ import annotations

import copy
from array import array
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.common.language import llama
from weft.attach import records
from weft.combine import RuleError
from weft.combining import combine, rule_of
from weft.data.rows import Example
from weft.differences import differences
from weft.own_data import own_statistics

WHERE = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


class Tokenizer:
    pad_token_id = 0
    eos_token_id = 0


def rows(seed: int) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 40, (7 + i,), generator=draw).tolist() for i in range(3)]
    return [Example(array("i", row), array("i", [-100, *row[1:]]), "x", i) for i, row in enumerate(ids)]


ROWS = {"one": rows(1), "two": rows(2)}
EQUAL = {"one": 1.0, "two": 1.0}


@pytest.fixture
def model() -> nn.Module:
    found: nn.Module = llama()
    for name, seed in (("one", 1), ("two", 2)):
        weft.attach(found, weft.LoRA(rank=2), WHERE, name=name, seed=seed)
        with torch.no_grad():
            for p in weft.parameters(found, name):
                p.add_(0.3 * torch.randn_like(p))
    weft.use(found, None)
    return found


def changed(model: nn.Module, changes: dict[str, torch.Tensor]) -> Any:
    """A plain model with changed weights."""
    plain = copy.deepcopy(model)
    for name in list(records(plain)):
        weft.detach(plain, name)
    with torch.no_grad():
        for address, change in changes.items():
            plain.get_submodule(address).weight.add_(change)
    return plain.eval()


def grams(plain: nn.Module, examples: list[Example]) -> dict[str, torch.Tensor]:
    seen: dict[str, list[torch.Tensor]] = {address: [] for address in WHERE}
    for address, each in seen.items():
        plain.get_submodule(address).register_forward_pre_hook(lambda _, args, each=each: each.append(args[0][0]))
    with torch.no_grad():
        for example in examples:
            plain(input_ids=torch.tensor([list(example.input_ids)]))
    joined = {address: torch.cat(each) for address, each in seen.items()}
    return {address: x.mT @ x / len(x) for address, x in joined.items()}


def of(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return {address: d.weight() for address, d in differences(model, name).items()}


def test_regmean_is_the_best_linear_map_for_the_inputs_of_both(model: nn.Module) -> None:
    rule = rule_of("regmean", {"off_diagonal": 1.0})
    found = own_statistics(model, EQUAL, rule, Tokenizer(), ROWS)  # type: ignore[arg-type]
    expected = {name: grams(changed(model, of(model, name)), ROWS[name]) for name in EQUAL}
    for name, own in expected.items():
        for address, gram in own.items():
            torch.testing.assert_close(found[name][address], gram, rtol=1e-4, atol=1e-5)
    combine(model, EQUAL, rule, name="both", loss=0.0, statistics=found)
    for address, change in of(model, "both").items():
        parts = [(of(model, name)[address].double(), expected[name][address].double()) for name in EQUAL]
        # where the gradient of sum_k tr((W - W_k) G_k (W - W_k)^T) is zero
        slope = sum((change.double() - d) @ g for d, g in parts)
        assert slope.norm() < 1e-3 * sum((d @ g).norm() for d, g in parts)


def test_fisher_is_the_mean_squared_gradient_of_each_row(model: nn.Module) -> None:
    rule = rule_of("fisher", {"least": 1e-12})
    found = own_statistics(model, EQUAL, rule, Tokenizer(), ROWS)  # type: ignore[arg-type]
    plain = changed(model, of(model, "two"))
    expected = {address: torch.zeros_like(plain.get_submodule(address).weight) for address in WHERE}
    for example in ROWS["two"]:
        ids = torch.tensor([list(example.input_ids)])
        plain.zero_grad()
        plain(input_ids=ids, labels=ids).loss.backward()
        for address, total in expected.items():
            total += plain.get_submodule(address).weight.grad.square() / len(ROWS["two"])
    for address, fisher in expected.items():
        torch.testing.assert_close(found["two"][address], fisher.detach(), rtol=1e-3, atol=1e-9)
    combine(model, EQUAL, rule, name="both", loss=0.0, statistics=found)
    for address, change in of(model, "both").items():
        f, d = [found[n][address] for n in EQUAL], [of(model, n)[address] for n in EQUAL]
        wanted = (f[0] * d[0] + f[1] * d[1]) / (f[0] + f[1])
        torch.testing.assert_close(change, wanted, rtol=1e-3, atol=1e-4)


def test_through_merged_layers_means_the_inputs_that_these_make(model: nn.Module) -> None:
    alone = own_statistics(model, EQUAL, rule_of("regmean"), Tokenizer(), ROWS)  # type: ignore[arg-type]
    rule = rule_of("regmean", {"through": "merged"})
    found = own_statistics(model, EQUAL, rule, Tokenizer(), ROWS)  # type: ignore[arg-type]
    assert records(model).keys() == EQUAL.keys()
    combine(model, EQUAL, "regmean", name="first", statistics=alone, layers={0})
    low, high = WHERE
    for name in EQUAL:
        torch.testing.assert_close(found[name][low], alone[name][low])
        mixed = changed(model, {low: of(model, "first")[low], high: of(model, name)[high]})
        torch.testing.assert_close(found[name][high], grams(mixed, ROWS[name])[high], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[name][high], alone[name][high], rtol=1e-2)


def test_what_cannot_be_weighed_is_refused(model: nn.Module) -> None:
    rule = rule_of("fisher")
    with pytest.raises(RuleError, match="no rows of it"):
        own_statistics(model, EQUAL, rule, Tokenizer(), {"one": ROWS["one"]})  # type: ignore[arg-type]
    with pytest.raises(RuleError, match="by its own data"):
        own_statistics(model, EQUAL, rule_of("ties"), Tokenizer(), ROWS)  # type: ignore[arg-type]
    with pytest.raises(RuleError, match="give statistics"):
        combine(model, EQUAL, rule, name="both")
    with pytest.raises(RuleError, match="leave them out"):
        combine(model, EQUAL, "linear", name="both", statistics={})
    with pytest.raises(RuleError, match=f"lack {WHERE[0]}"):
        combine(model, EQUAL, rule, name="both", statistics={"one": {}, "two": {}})
    weft.attach(model, weft.LoRA(rank=2), "embed_tokens", name="words")
    with pytest.raises(RuleError, match="kind embedding"):
        own_statistics(model, {"words": 1.0}, rule_of("regmean"), Tokenizer(), {"words": ROWS["one"]})  # type: ignore[arg-type]
    assert "both" not in records(model)
