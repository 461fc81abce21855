"""Starts of LoRA from the weight's smallest components, from inputs and from gradients: by their papers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import weft
from tests.methods.test_rank_dynamics import LINEARS, Net
from weft.attach import records


def product_of(net: nn.Module, name: str) -> Tensor:
    adapter = records(net)["a"].adapters[name]
    return (adapter.method.scale * adapter.B @ adapter.A).detach()


def started(start: str, calibration: Any = None, **options: Any) -> nn.Module:
    net = Net()
    weft.attach(net, weft.LoRA(start=start, **options), LINEARS, name="a", calibration=calibration)
    return net


def test_milora_takes_the_smallest_components():
    net = started("milora", rank=3, alpha=5.0)
    u, s, v = torch.linalg.svd(net.up.weight.detach(), full_matrices=False)
    wanted = u[:, -3:] @ torch.diag(s[-3:]) @ v[-3:]
    torch.testing.assert_close(product_of(net, "up"), wanted, atol=1e-6, rtol=1e-4)


def test_eva_looks_where_inputs_vary():
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.logspace(0, -2, 16))
    net = started("eva", [x], rank=3)
    v = torch.linalg.svd(x, full_matrices=False).Vh[:3]
    found = records(net)["a"].adapters["up"]
    torch.testing.assert_close((found.A @ v.T).abs().detach(), torch.eye(3), atol=1e-4, rtol=1e-4)
    assert not found.B.any()
    assert not hasattr(found, "A0"), "its product is zero: there is nothing to subtract"


def gradient_of(net: nn.Module, x: Tensor) -> Tensor:
    net = copy.deepcopy(net)
    net.up.weight.requires_grad_(True)
    net(x).backward()
    return net.up.weight.grad


def test_lora_ga_takes_the_gradients_directions():
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    net = started("lora-ga", [x], rank=3, alpha=6.0)
    u, _, v = torch.linalg.svd(gradient_of(Net(), x), full_matrices=False)
    wanted = 24**0.5 / 16 * u[:, 3:6] @ torch.diag(_signs(records(net)["a"].adapters["up"], u, v)) @ v[:3]
    found = records(net)["a"].adapters["up"]
    torch.testing.assert_close((found.B @ found.A).detach(), wanted, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(torch.linalg.vector_norm(found.A, dim=1).detach(), torch.full((3,), 24**0.25 / 4))


def _signs(adapter: Any, u: Tensor, v: Tensor) -> Tensor:
    """The signs of singular vectors are free, each pair's together."""
    return (adapter.A @ v[:3].T).diagonal().sign() * (u[:, 3:6].T @ adapter.B).diagonal().sign()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_lora_ga_looks_where_pefts_does():
    """The directions: PEFT scales B by the singular values and A not at all, which the paper's algorithm does not."""
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    base = Net()
    config = peft.LoraConfig(
        r=3, target_modules=LINEARS, init_lora_weights="lora_ga", lora_ga_config=peft.tuners.lora.LoraGAConfig()
    )
    peft.tuners.lora.preprocess_loraga(base, config, lambda: base(x).backward())
    theirs = peft.get_peft_model(base, config).base_model.model.up
    ours = records(started("lora-ga", [x], rank=3))["a"].adapters["up"]
    for a, b in ((ours.A, theirs.lora_A["default"].weight), (ours.B.T, theirs.lora_B["default"].weight.T)):
        cosines = nn.functional.cosine_similarity(a, b, dim=1).abs()
        torch.testing.assert_close(cosines.detach(), torch.ones(3), atol=1e-4, rtol=1e-4)


def test_riemannlora_starts_where_its_tangent_space_holds_most_of_the_gradient():
    """|projection of G|^2 is what the 2 R largest singular values hold, which no point of rank R beats."""
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    net = started("riemannlora", [x], rank=3, alpha=6.0)
    delta, g = product_of(net, "up"), gradient_of(Net(), x)
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    torch.testing.assert_close(s[:3], torch.ones(3), atol=1e-5, rtol=1e-5)

    def held(u: Tensor, v: Tensor) -> Tensor:
        left, right = u[:, :3] @ u[:, :3].T, v[:3].T @ v[:3]
        return (left @ g + g @ right - left @ g @ right).square().sum()

    best = torch.linalg.svdvals(g)[:6].square().sum()
    torch.testing.assert_close(held(u, v), best, rtol=1e-4, atol=1e-8)
    other = torch.linalg.svd(torch.randn(24, 16, generator=torch.Generator().manual_seed(2)), full_matrices=False)
    assert held(other[0], other[2]) < 0.9 * best


@pytest.mark.parametrize("start", ["milora", "lora-ga", "riemannlora", "eva"])
def test_no_start_edits_the_base(start):
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    before = Net()
    net = started(start, None if start == "milora" else [x], rank=3)
    assert torch.equal(net.up.weight, before.up.weight)
    torch.testing.assert_close(net(x), before(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": "lora-ga", "rank": 9}, "2 \\* 9 is more than the 16 directions"),
        ({"start": "eva", "rank": 17}, "rank=17 is more than the 16 directions"),
        ({"start": "milora", "rank": 17}, "rank=17 is more than the 16 directions"),
    ],
)
def test_a_rank_that_a_start_does_not_have_says_why(options, words):
    with pytest.raises(weft.targets.TargetError, match=words):
        weft.attach(Net(), weft.LoRA(**options), ["up"])


class Three(nn.Module):
    """Three maps of inputs that vary in few directions, in some, and in all alike."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = (nn.Linear(16, 12, bias=False) for _ in range(3))

    def forward(self, x):
        fall = torch.arange(16.0)
        return self.one(x * 0.1**fall) + self.two(x * 0.7**fall) + self.three(x)


def varied(num: int = 200) -> Tensor:
    """Inputs without a mean, as HF PEFT takes it off."""
    x = torch.randn(num, 16, generator=torch.Generator().manual_seed(1))
    return x - x.mean(0)


@pytest.mark.oracle
@pytest.mark.parametrize(("rho", "ranks"), [(2.0, [1, 3, 8]), (1.5, [1, 5, 6])])
def test_eva_shares_ranks_as_peft_does(rho, ranks):
    net, x, names = Three(), varied(), ["one", "two", "three"]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=names, init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, use_label_mask=False),
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.get_peft_model(copy.deepcopy(net), config)
    peft.initialize_lora_eva_weights(
        theirs, [{"x": x}] * 3, prepare_model_inputs_fn=None, show_progress_bar=False,
        prepare_layer_inputs_fn=lambda inputs, *_: inputs[0] if isinstance(inputs, tuple) else inputs,
    )  # fmt: skip
    wanted = {n: getattr(theirs.base_model.model, n) for n in names}
    plan = weft.attach(net, weft.LoRA(rank=4, alpha=6.0, start="eva", rho=rho), names, name="a", calibration=[x])
    found = {s.site.address: s.method for s in plan.sites}
    for name, layer in wanted.items():
        assert found[name].rank == layer.r["default"]
        assert found[name].scale == pytest.approx(layer.scaling["default"])
        a = records(net)["a"].adapters[name].A.detach()
        mine, other = (t / t.norm(dim=1, keepdim=True) for t in (a, layer.lora_A["default"].weight.detach()))
        agreement = (mine * other).sum(1).abs()  # theirs comes of an incremental decomposition
        torch.testing.assert_close(agreement, torch.ones(len(a)), atol=2e-2, rtol=0)
    assert sorted(m.rank for m in found.values()) == ranks


def test_eva_deals_one_budget_and_leaves_sites_out(tmp_path):
    net, x = Three(), varied()
    net.forward = lambda x: net.one(x * torch.eye(16)[0]) + net.three(x)  # the first sees one direction only
    plan = weft.attach(net, weft.LoRA(rank=2, start="eva", rho=8.0), ["one", "three"], name="a", calibration=[x])
    assert [s.method.rank for s in plan.sites] == [1, 3]
    weft.save(net, tmp_path, name="a")
    again = Three()
    loaded = weft.load(again, tmp_path, name="a")
    assert [s.method for s in loaded.sites] == [s.method for s in plan.sites]
    for p, q in zip(weft.parameters(net), weft.parameters(again), strict=True):
        assert torch.equal(p, q)
    few = Three()
    few.forward = lambda x: few.two(x * (torch.arange(16) < 2)) + few.three(x)
    plan = weft.attach(few, weft.LoRA(rank=1, start="eva", rho=2.0), ["two", "three"], name="a", calibration=[x])
    assert [(s.site.address, s.method.rank) for s in plan.sites] == [("two", 2)]
    assert records(few)["a"].adapters.keys() == {"two"}


def test_ranks_are_shared_by_variance_only_where_it_is_known():
    with pytest.raises(ValueError, match="which start='eva' alone reads"):
        weft.attach(Net(), weft.LoRA(rho=2.0), LINEARS)
