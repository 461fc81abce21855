"""Adapters made smaller on a model: the loss that was stated holds, or nothing is made."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft
from tests.common.language import ids, llama
from tests.test_parity import METHODS, adapted
from weft.attach import AdapterError, records
from weft.compressing import input_roots, lost, num_bytes, shrink, to_lora
from weft.differences import differences

M = weft.methods()


def carrying(method, targets=("q_proj", "up_proj"), *, moved: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    model = llama()
    weft.attach(model, method, [*targets] if isinstance(targets, tuple) else targets, name="a")
    with torch.no_grad():
        for p in weft.parameters(model, "a"):
            p.add_(moved * torch.randn(p.shape))
    return model


def logits(model: nn.Module, name: str) -> torch.Tensor:
    torch.manual_seed(5)
    with torch.no_grad(), weft.using(model, name):
        return model(ids(2, 6)).logits


LOW = {"lora": M["lora"](rank=6), "vera": M["vera"](rank=6), "dora": M["dora"](rank=2), "oft": M["oft"](block_size=4)}


@pytest.mark.parametrize("name", LOW)
def test_any_change_of_a_weight_is_a_lora(name: str) -> None:
    model = carrying(LOW[name])
    losses = to_lora(model, "a", name="b")
    assert max(losses.values()) < 1e-4
    assert {s.method.name for s in records(model)["b"].plan.sites} == {"lora"}
    torch.testing.assert_close(logits(model, "b"), logits(model, "a"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_lora_or_says_why_not(name: str) -> None:
    """Every method that is linear in its input, at all its sites, or a sentence with the place and the reason."""
    model = adapted(name)
    try:
        before = differences(model, "a")
    except AdapterError:
        with pytest.raises(AdapterError, match=r"changes no weight that could be combined.*use it in a route"):
            to_lora(model, "a", name="b")
        return
    if any(d.shift is not None or d.weight().ndim < 2 for d in before.values()):
        with pytest.raises(AdapterError, match=r"LoRA adds to weights only|shifts its output"):
            to_lora(model, "a", name="b")
        return
    losses = to_lora(model, "a", name="b")
    after = differences(model, "b")
    assert losses.keys() == before.keys()
    assert max(losses.values()) < 1e-4
    for address, change in before.items():
        scale = change.weight().abs().max().item()
        torch.testing.assert_close(after[address].weight(), change.weight(), rtol=0, atol=1e-3 * scale)


def test_a_weight_that_two_modules_share_stays_shared() -> None:
    torch.manual_seed(0)
    model, _ = weft.load_base("pico")
    weft.attach(model, LOW["lora"], "embed_tokens", name="a", tied="share")
    with torch.no_grad():
        for p in weft.parameters(model, "a"):
            p.add_(0.05 * torch.randn(p.shape))
    assert max(to_lora(model, "a", name="b").values()) < 1e-4
    torch.testing.assert_close(logits(model, "b"), logits(model, "a"), rtol=1e-4, atol=1e-3)


def test_what_is_lost_is_measured() -> None:
    model = carrying(LOW["dora"])
    losses = to_lora(model, "a", name="b", rank=1)
    before, after = differences(model, "a"), differences(model, "b")
    for address, share in losses.items():
        whole, left = before[address].weight(), before[address].weight() - after[address].weight()
        assert share == pytest.approx((left.norm() / whole.norm()).item(), rel=1e-4)
    assert max(losses.values()) > 0.01
    weft.detach(model, "b")
    assert max(to_lora(model, "a", name="b", loss=0.2).values()) <= 0.2


@pytest.mark.parametrize(("method", "targets", "reason"), [
    ("norm_tuning", "norms", "changes a norm here, and LoRA adds to weights only"),
    ("bottleneck", None, "no weight"),
])  # fmt: skip
def test_what_no_lora_does_is_refused(method: str, targets: str | None, reason: str) -> None:
    model = carrying(M[method](), targets)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(AdapterError, match=reason):
        to_lora(model, "a", name="b")
    assert [*records(model)] == ["a"]
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in before.items()}


@pytest.mark.parametrize("loss", [0.4, 0.6])
def test_a_stated_loss_of_the_weights_holds(loss: float) -> None:
    model = carrying(LOW["lora"])
    found = shrink(model, "a", name="b", loss=loss)
    assert not found.refused
    assert max(found.losses.values()) <= loss
    assert found.losses == lost(model, "a", "b")
    assert found.bytes_after == num_bytes(model, "b") < num_bytes(model, "a") == found.bytes_before
    ranks = {s.site.address: s.method.rank for s in found.plan.sites}
    weft.detach(model, "b")
    for rank in set(ranks.values()) - {1}:  # one less would have lost more, at each site
        smaller = to_lora(model, "a", name="b", rank=rank - 1)
        weft.detach(model, "b")
        assert all(smaller[address] > loss for address, r in ranks.items() if r == rank)


def test_rounding_alone_may_be_too_much() -> None:
    found = shrink(model := carrying(LOW["lora"]), "a", name="b", loss=1e-12)
    assert "rounding alone loses" in found.refused
    assert [*records(model)] == ["a"]


def test_the_loss_per_token_holds_and_is_used_up() -> None:
    model = carrying(LOW["lora"])
    asked: list[str] = []

    def loss_of(name: str) -> float:
        """Grows by half of what is lost of the weights."""
        asked.append(name)
        return 2.0 if name == "a" else 2.0 * (1 + 0.5 * max(lost(model, "a", name).values()))

    found = shrink(model, "a", name="b", loss=0.25, loss_of=loss_of)
    assert not found.refused
    assert 0 < found.growth <= 0.25
    assert found.growth == pytest.approx(0.5 * max(found.losses.values()))
    assert found.bytes_after < found.bytes_before
    weft.detach(model, "b")
    assert shrink(model, "a", name="b", loss=0.05, loss_of=loss_of).bytes_after > found.bytes_after
    assert asked.count("a") == 2  # measured once each


def test_what_is_no_smaller_is_refused() -> None:
    model = carrying(LOW["lora"])
    found = shrink(model, "a", name="b", loss=1e-3)
    size = num_bytes(model, "a")
    assert found.refused == f"a loss of at most 0.100% takes {size:,} bytes, and the adapter has {size:,}"
    assert [*records(model)] == ["a"]


def test_a_loss_that_cannot_be_reached_is_refused() -> None:
    model = carrying(LOW["lora"])
    found = shrink(model, "a", name="b", loss=0.01, loss_of=lambda name: 2.0 if name == "a" else 2.1)
    assert "grows by 5.000% with all that principal keeps, more than 1.000%" in found.refused
    assert [*records(model)] == ["a"]


@pytest.mark.parametrize(("way", "loss"), [("bits", 0.1), ("one_bit", 0.9), ("compeft", 0.8)])
@pytest.mark.parametrize("method", ["lora", "vera", "oft"])
def test_tensors_in_code_hold_the_loss(way: str, loss: float, method: str) -> None:
    model = carrying(LOW[method])
    found = shrink(model, "a", name="b", way=way, loss=loss)
    if found.refused:  # a rotation, which one bit does not reach
        assert "is lost at" in found.refused or "takes" in found.refused
        assert [*records(model)] == ["a"]
        return
    assert found.losses == lost(model, "a", "b")
    assert max(found.losses.values()) <= loss
    assert found.plan.method == LOW[method]
    live = records(model)["b"].adapters
    for name, code in found.codes.items():
        address, _, leaf = name.rpartition(".")
        assert torch.equal(code.tensor(), live[address].tensors()[leaf])
    assert {n.rpartition(".")[0] for n in found.codes} == live.keys()


@pytest.mark.parametrize(("best", "how"), [(2.0, {"loss": 0.5}), (10.0, {"size": 0.3}), (None, {"loss": 0.5})])
def test_alpha_is_tuned_by_the_loss_per_token(best: float | None, how: dict) -> None:
    """best: the alpha for which a stand-in for a loss is smallest; None: the scale that comes nearest."""
    model = carrying(LOW["lora"])
    whole = {
        a: {k: t.detach().clone() for k, t in ad.tensors().items()} for a, ad in records(model)["a"].adapters.items()
    }

    def loss_of(name: str) -> float:
        if name == "a":
            return 2.0
        own = records(model)[name].adapters
        tensor, before = next((own[a].tensors()[k], t) for a, ts in whole.items() for k, t in ts.items())
        scale, kept = float(tensor.detach().abs().max()), tensor != 0
        wanted = float(before[kept].abs().mean()) if best is None else best * float(before.std())
        return 2.1 + abs(scale - wanted)

    found = shrink(model, "a", name="b", way="compeft", loss_of=loss_of, **how)
    assert not found.refused
    assert found.alpha == best
    assert found.after == pytest.approx(2.1, abs=1e-4) == loss_of("b")
    live = records(model)["b"].adapters
    for name, code in found.codes.items():
        address, _, leaf = name.rpartition(".")
        assert torch.equal(code.tensor(), live[address].tensors()[leaf])


def test_bits_are_as_few_as_the_loss_allows() -> None:
    model = carrying(LOW["lora"])
    sizes = []
    for loss in (0.5, 0.1, 0.02):
        found = shrink(model, "a", name="b", way="bits", loss=loss)
        assert not found.refused
        assert max(found.losses.values()) <= loss
        sizes.append(found.bytes_after)
        weft.detach(model, "b")
        fewer = shrink(model, "a", name="b", way="bits", loss=max(found.losses.values()) * 0.999)
        assert fewer.refused or fewer.bytes_after >= found.bytes_after
        if not fewer.refused:
            weft.detach(model, "b")
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] < num_bytes(model, "a")


def test_what_no_weight_expresses_is_compared_by_its_tensors() -> None:
    model = carrying(M["bottleneck"](), None)
    found = shrink(model, "a", name="b", way="bits", loss=0.1)
    assert (found.of, found.refused) == ("tensors", "")
    old, new = (records(model)[n].adapters for n in "ab")
    for address, loss in found.losses.items():
        shares = [
            ((t - new[address].tensors()[k]).norm() / t.norm()).item()
            for k, t in old[address].tensors().items()
            if t.norm()
        ]
        assert loss == pytest.approx(max(shares), rel=1e-3)
        assert loss <= 0.1
    with pytest.raises(AdapterError, match="no weight"):
        shrink(model, "a", name="c", loss=0.1)
    assert [*records(model)] == ["a", "b"]


@pytest.mark.parametrize("way", ["principal", "bits"])
def test_a_budget_is_kept_and_spent_where_it_helps(way: str) -> None:
    model = carrying(LOW["lora"])
    with torch.no_grad():
        for p in records(model)["a"].adapters["model.layers.0.self_attn.q_proj"].parameters():
            p.mul_(10)  # its change is a hundred times as large as those of others
    found = shrink(model, "a", name="b", way=way, size=0.5)
    assert not found.refused
    assert found.bytes_after <= 0.5 * found.bytes_before
    large = found.losses.pop("model.layers.0.self_attn.q_proj")
    assert large < 0.2 * max(found.losses.values())
    weft.detach(model, "b")
    assert "the smallest that" in shrink(model, "a", name="b", way=way, size=0.01).refused
    assert [*records(model)] == ["a"]


@pytest.mark.parametrize("method", ["lora", "oft"])
def test_a_loss_in_the_output_is_of_what_the_site_changes_on_data(method: str) -> None:
    model = carrying(LOW[method], ("q_proj", "down_proj"))
    batches = [{"input_ids": ids(2, 6)} for _ in range(2)]
    roots = input_roots(model, "a", batches)
    seen: dict[str, list[torch.Tensor]] = {}
    modules = {a: model.get_submodule(a) for a in roots}
    hooks = [
        m.register_forward_pre_hook(lambda _m, x, a=a: seen.setdefault(a, []).append(x[0])) for a, m in modules.items()
    ]
    with torch.no_grad(), weft.using(model, None):
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    found = shrink(model, "a", name="b", loss=0.3, roots=roots)
    assert found.of == "output"
    assert not found.refused or method == "oft"
    if found.refused:
        return
    old, new = differences(model, "a"), differences(model, "b")
    plain = shrink(model, "a", name="c", loss=0.3)
    smaller = 0
    for address, loss in found.losses.items():
        x = torch.cat(seen[address]).flatten(0, 1).double()
        wanted, made = (x @ d[address].weight().double().mT for d in (old, new))
        assert loss == pytest.approx(((wanted - made).norm() / wanted.norm()).item(), rel=1e-3)
        assert loss <= 0.3
        smaller += found.settings[address] < plain.settings[address]
    assert smaller, "data that a weight is read with takes fewer directions than the weight has"


def test_outputs_are_compared_at_linear_maps_only() -> None:
    model = carrying(LOW["lora"], ("embed_tokens",))
    with pytest.raises(AdapterError, match=r"embed_tokens is of kind embedding: a loss in the output"):
        input_roots(model, "a", [])


def test_a_loss_or_a_size_is_asked_for() -> None:
    model = carrying(LOW["lora"])
    with pytest.raises(ValueError, match="give one of them"):
        shrink(model, "a", name="b")
    with pytest.raises(ValueError, match="no way 'bit'"):
        shrink(model, "a", name="b", way="bit", loss=0.1)
