"""Adapters made of adapters: exact where a sum is asked for, at the stated loss elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft
from tests.common.language import ids, llama
from weft.attach import AdapterError, records
from weft.combining import combine, rule_of
from weft.core.thin import rank_for, singular
from weft.differences import differences

M = weft.methods()


def moved(model: nn.Module, name: str, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in weft.parameters(model, name):
            p.add_(0.1 * torch.randn(p.shape, generator=draw))


def carrying(**methods) -> nn.Module:
    torch.manual_seed(0)
    model = llama()
    for seed, (name, method) in enumerate(methods.items()):
        weft.attach(model, method, ["q_proj", "up_proj"] if seed != 1 else ["q_proj", "down_proj"], name=name)
        moved(model, name, seed)
    return model


def logits(model: nn.Module, route) -> torch.Tensor:
    with torch.no_grad(), weft.using(model, route):
        return model(rows()).logits


def rows() -> torch.Tensor:
    torch.manual_seed(5)
    return ids(2, 6)


LOW = {
    "lora": M["lora"](rank=3, rank_stabilised=True), "pissa": M["lora"](rank=2, start="pissa"),
    "vera": M["vera"](rank=6),
    "tensor_train": M["tensor_train"](rank=4),
}  # fmt: skip
DENSE = {"dora": M["dora"](rank=2), "lokr": M["lokr"](rank=2), "ia3": M["ia3"](), "oft": M["oft"](block_size=4)}


@pytest.mark.parametrize("second", [*LOW, *DENSE])
def test_a_sum_is_the_blend_of_its_parents(second):
    model = carrying(a=M["lora"](rank=4), b={**LOW, **DENSE}[second])
    made = combine(model, {"a": 0.7, "b": -0.4}, name="c")
    assert made.loss < 1e-5
    torch.testing.assert_close(logits(model, "c"), logits(model, {"a": 0.7, "b": -0.4}), rtol=1e-4, atol=1e-4)
    kinds = {s.method.name for s in made.plan.sites}
    assert kinds == ({"lora"} if second in LOW else {"lora", "full"})  # where both are, a dense one stays dense


@pytest.mark.parametrize("name", sorted({**LOW, **DENSE, "bias": None, "norm": None}))
@pytest.mark.parametrize("rule", ["task_arithmetic", "linear"])
def test_one_adapter_with_weight_one_is_that_adapter(name, rule):
    model = llama()
    method = {**LOW, **DENSE, "bias": M["bias_tuning"](), "norm": M["norm_tuning"]()}[name]
    weft.attach(model, method, "all-linear" if name != "norm" else None, name="a")
    moved(model, "a", 1)
    weft.attach(model, M["lora"](rank=2), name="other")
    combine(model, {"a": 1.0, "other": 0.0} if rule == "task_arithmetic" else ["a"], rule, name="c")
    assert records(model)["c"].plan.method == method
    assert torch.equal(logits(model, "c"), logits(model, "a"))
    weft.detach(model, "a")
    assert not torch.equal(logits(model, "c"), logits(model, None))  # it holds tensors of its own


def test_the_rank_of_a_sum_is_what_it_needs():
    model = carrying(a=M["lora"](rank=4), b=M["lora"](rank=4))
    with torch.no_grad():  # the same space twice
        for address, adapter in records(model)["b"].adapters.items():
            if "q_proj" in address:
                for k, p in adapter.named_parameters():
                    p.copy_(dict(records(model)["a"].adapters[address].named_parameters())[k])
    made = combine(model, ["a", "b"], name="c")
    assert {s.method.rank for s in made.plan.sites} == {4}


def test_a_smaller_rank_states_what_it_loses():
    model = carrying(a=M["lora"](rank=4), b=M["lora"](rank=4))
    made = combine(model, ["a", "b"], name="c", rank=3)
    whole, kept = combine(model, ["a", "b"], name="d"), differences(model, "c")
    for address, d in differences(model, "d").items():
        lost = torch.linalg.matrix_norm(d.weight() - kept[address].weight()) / torch.linalg.matrix_norm(d.weight())
        assert lost.item() == pytest.approx(made.losses[address], abs=1e-4)
    assert 0.05 < made.loss < 1
    assert "lost of the combined change: at most" in str(made)
    assert whole.plan.num_parameters > made.plan.num_parameters
    bounded = combine(model, ["a", "b"], name="e", loss=0.3)
    assert bounded.loss <= 0.3
    assert min(s.method.rank for s in bounded.plan.sites) < 8


@pytest.mark.parametrize("rule", ["ties", "dare", "sce", "karcher", "tsv", "knots"])
def test_other_rules_see_the_dense_changes(rule):
    model = carrying(a=M["lora"](rank=4), b=M["lora"](rank=4))
    before = [differences(model, n) for n in ("a", "b")]
    combine(model, ["a", "b"], rule, name="c", rank=32, seed=3)
    after, draw = differences(model, "c"), torch.Generator().manual_seed(3)
    for address in before[0] | before[1]:
        each = [d[address].weight() if address in d else None for d in before]
        zero = torch.zeros_like(next(e for e in each if e is not None))
        wanted = rule_of(rule)([zero if e is None else e for e in each], base=zero, generator=draw)
        if not rule_of(rule).random:
            torch.testing.assert_close(after[address].weight(), wanted, rtol=1e-3, atol=1e-4)
    made = combine(model, ["a", "b"], rule, name="d")
    assert {s.method.rank for s in made.plan.sites} == {4}  # as large as the parents, and the loss is said


def test_saved_it_is_an_ordinary_adapter(tmp_path):
    model = carrying(a=M["lora"](rank=4), b=M["vera"](rank=6))
    combine(model, {"a": 1.0, "b": 0.5}, name="c")
    weft.save(model, tmp_path / "c", "c", format="peft")
    weft.load(model, tmp_path / "c", "again")
    torch.testing.assert_close(logits(model, "again"), logits(model, "c"))


def test_what_cannot_be_combined_is_said():
    model = carrying(a=M["lora"](rank=4), b=M["bottleneck"](width=4))
    with pytest.raises(AdapterError, match="bottleneck changes no weight that could be combined"):
        combine(model, ["a", "b"], name="c")
    with pytest.raises(AdapterError, match="no adapter 'z'"):
        combine(model, ["a", "z"], name="c")
    with pytest.raises(ValueError, match="there is no rule 'tie'; did you mean 'ties'"):
        combine(model, ["a"], "tie", name="c")
    with pytest.raises(ValueError, match="ties has no option 'densty'"):
        rule_of("ties", {"densty": 0.1})
    with pytest.raises(ValueError, match="give one of them"):
        combine(model, ["a"], name="c", rank=2, loss=0.1)
    with pytest.raises(ValueError, match="fisher weighs adapters by the fisher of their own data"):
        combine(model, ["a"], "fisher", name="c")
    assert "c" not in records(model)


def test_singular_values_of_thin_matrices():
    b, a = torch.randn(20, 3, dtype=torch.float64), torch.randn(3, 15, dtype=torch.float64)
    u, s, v = singular(b, a)
    torch.testing.assert_close(u * s @ v, b @ a)
    torch.testing.assert_close(s, torch.linalg.svdvals(b @ a)[:3])
    assert rank_for(torch.tensor([3.0, 4e-9]), 1e-6) == 1
    assert rank_for(torch.tensor([[3.0, 0.0], [3.0, 3.0]]), 0.1) == 2
