"""What the common checks cannot see: which entries a mask picks, what sites share, which experts a router uses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from tests.common import language
from weft.attach import records
from weft.targets import TargetError


def tensors(model: nn.Module, address: str = "0") -> dict[str, Tensor]:
    return records(model)["default"].adapters[address].tensors()


def chosen(method: weft.Method, layer: nn.Linear) -> Tensor:
    """A mask of the entries of a linear layer's weight that train."""
    model = nn.Sequential(layer)
    weft.attach(model, method, targets=["0"])
    rows, columns = tensors(model)["indices"].long()
    mask = torch.zeros(layer.out_features, layer.in_features, dtype=torch.bool)
    mask[rows, columns] = True
    assert mask.sum() == method.rank * (layer.in_features + layer.out_features)  # as many as a LoRA, none twice
    return mask


def best(score: Tensor, count: int) -> Tensor:
    return score >= score.flatten().sort(descending=True).values[count - 1]


def test_shira_masks() -> None:
    layer = nn.Linear(12, 10)
    weight, start = layer.weight.detach().clone(), layer.state_dict()
    x, y = torch.randn(64, 12), torch.randn(64, 10)

    class Loss(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (self.inner(x) - y).square().mean()

    gradient = torch.autograd.grad(Loss(layer)(x, y), layer.weight)[0].abs()
    assert torch.equal(chosen(weft.SHiRA(rank=2, mask="magnitude"), layer), best(weight.abs(), 44))

    def loss(w: Tensor) -> Tensor:
        return (nn.functional.linear(x, w, layer.bias) - y).square().mean()

    product = torch.autograd.functional.hvp(loss, weight, torch.autograd.functional.jacobian(loss, weight))[1]
    scores = {"gradient": gradient, "snip": gradient * weight.abs(), "grasp": weight * product}
    for mask, score in scores.items():
        model = Loss(nn.Linear(12, 10))
        model.inner.load_state_dict(start)
        weft.attach(model, weft.SHiRA(rank=2, mask=mask), targets=["inner"], calibration=[(x, y)])
        rows, columns = tensors(model, "inner")["indices"].long()
        assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == set(
            map(tuple, best(score, 44).nonzero().tolist())
        )
    struct = chosen(weft.SHiRA(rank=2, mask="structured"), nn.Linear(12, 10))
    assert struct.diagonal().all()
    assert struct.all(1).nonzero().flatten().tolist() == [0, 5]  # evenly spaced
    one, two = (chosen(weft.SHiRA(rank=2), nn.Linear(12, 10)) for _ in range(2))
    assert torch.equal(one, two)  # seeded by the address


def test_shira_looks_at_the_curvature_of_a_language_model() -> None:
    torch.manual_seed(0)
    model, rows = language.llama(), language.ids()  # its attention runs in plain steps for that
    before = model(input_ids=rows).logits.detach()
    plan = weft.attach(
        model, weft.SHiRA(rank=1, mask="grasp"), ["q_proj"], calibration=[{"input_ids": rows, "labels": rows}]
    )
    assert len(plan.sites) == 3
    assert torch.equal(model(input_ids=rows).logits, before)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "adapters" not in n)


def test_shira_by_gradient_needs_data() -> None:
    with pytest.raises(ValueError, match="pass calibration=batches"):
        weft.attach(nn.Sequential(nn.Linear(12, 10)), weft.SHiRA(rank=2, mask="snip"), targets=["0"])


def test_svft_top_k_picks_what_agrees_most() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 9))
    weft.attach(model, weft.SVFT(pattern="top_k", width=1), targets=["0"])
    t = tensors(model)
    agreement = (t["U"].mT @ t["V"].mT).abs()
    assert torch.equal(
        torch.zeros(81, dtype=torch.bool).index_fill(0, t["places"].long(), True).view(9, 9), best(agreement, 25)
    )
    x = torch.randn(4, 9)
    before = model(x)
    with torch.no_grad():
        t["M"].normal_()
    M = torch.zeros(81).index_put((t["places"].long(),), t["M"]).view(9, 9)
    torch.testing.assert_close(model(x), before + x @ (t["U"] @ M @ t["V"]).mT)
    with pytest.raises(TargetError, match=r"svft cannot adapt 0: pattern='top_k' compares .* 9 and 7 entries"):
        weft.resolve(nn.Sequential(nn.Linear(7, 9)), weft.SVFT(pattern="top_k"), ["0"])


def test_svft_plain_scales_the_singular_values() -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False))
    values = torch.linalg.svdvals(model[0].weight.detach())
    weft.attach(model, weft.SVFT(pattern="plain"), targets=["0"])
    with torch.no_grad():
        tensors(model)["M"].fill_(0.5)
    weft.merge(model, "default")
    torch.testing.assert_close(torch.linalg.svdvals(model[0].weight.detach()), values + 0.5)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def test_tensor_train_shares_cores_between_sites_of_one_shape() -> None:
    model = llama()
    plan = weft.attach(model, weft.TensorTrain(rank=3), targets="all-linear")
    shared = records(model)["default"].shared["tensor_train"].tensors()
    shapes = {(16, 16), (8, 16), (24, 16), (16, 24)}  # q and o, k and v, gate and up, down
    assert {k: tuple(v.shape) for k, v in shared.items()} == {
        **{f"A_{o}x{i}": (3, i) for o, i in shapes}, **{f"B_{o}x{i}": (o, 3) for o, i in shapes},
    }  # fmt: skip
    assert plan.num_parameters == 14 * 9 + sum(3 * (o + i) for o, i in shapes)
    assert plan.num_parameters == sum(p.numel() for p in weft.parameters(model))
    with torch.no_grad():
        for p in weft.parameters(model):
            p.normal_(0, 0.3)
    model(torch.arange(6)[None]).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in weft.parameters(model))


def test_top_k_uses_k_experts_per_token() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    weft.attach(model, weft.TopK(experts=weft.experts(weft.LoRA(rank=1, alpha=1.0), 4), k=2), targets=["0"])
    t = tensors(model)
    with torch.no_grad():
        t["G"].normal_()
        for k in range(4):
            t[f"{k}:B"].copy_(torch.eye(5)[:, k : k + 1])  # expert k writes channel k only
            t[f"{k}:A"].fill_(1.0)
    x = torch.rand(50, 6) + 0.1
    weft.use(model, None)
    base = model(x)
    weft.use(model, "default")
    used = (model(x) - base).abs() > 1e-6
    assert used.sum(1).unique().tolist() == [2]
    assert used[:, :4].any(0).sum() > 2  # not the same two for every token
    best_two = (x @ t["G"].mT).topk(2).indices.sort().values
    assert torch.equal(used.nonzero()[:, 1].view(50, 2), best_two)
    with pytest.raises(TargetError, match="k=5 is more than its 2 experts"):
        weft.resolve(model, weft.TopK(experts=weft.experts(weft.LoRA(), 2), k=5), ["0"])


RECIPES = {
    "houlsby": (weft.Bottleneck(reduction_factor=4.0), ["attention-blocks", "mlp-blocks"]),
    "pfeiffer": (weft.Bottleneck(reduction_factor=4.0, activation="relu"), "mlp-blocks"),
    "parallel": (weft.Bottleneck(placement="parallel", width=5, activation="relu", scale=4.0), "mlp-blocks"),
    "adaptformer": (weft.Bottleneck(placement="parallel", width=3, activation="relu", scale=0.1), "mlp-blocks"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_bottleneck_recipes_learn_in_a_model(recipe: str) -> None:
    method, targets = RECIPES[recipe]
    model, ids = llama(), torch.arange(12).view(2, 6)
    start = model(ids, labels=ids)
    weft.attach(model, method, targets=targets)
    assert torch.equal(model(ids).logits, start.logits)
    optimiser = torch.optim.Adam(weft.parameters(model), lr=0.02)
    for _ in range(8):
        optimiser.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
    assert loss < start.loss - 0.1
