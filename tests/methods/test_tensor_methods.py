"""What the common checks cannot see of tensor methods: sizes where structure pays, draws, and ranks that shrink."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.common.references import compacter as compacter_reference
from tests.common.references import moka as moka_reference
from tests.common.references import tensor_ring as ring_reference
from weft.attach import records
from weft.core import Part, Progress
from weft.core.op import DataOp
from weft.targets import TargetError

METHODS = weft.methods()


def attached(method: weft.Method, *shape: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*shape)).double().eval()
    weft.attach(model, method, ["0"])
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return records(model)["default"].adapters["0"].tensors()


@torch.no_grad()
def shake(model: nn.Module, noise: float = 0.2) -> None:
    for p in weft.parameters(model):
        p.add_(torch.randn_like(p) * noise)


STRUCTURED = [
    (METHODS["moka"](sizes=(32, 32)), (1024, 960), moka_reference),
    (METHODS["tensor_ring"](transform_rank=2, num_cores=2), (900, 20), ring_reference),
]


@pytest.mark.parametrize(("method", "shape", "reference"), STRUCTURED, ids=["moka", "tensor_ring"])
def test_large_sizes_use_kronecker_products(method, shape, reference, monkeypatch) -> None:
    model = attached(method, *shape)
    x = torch.randn(3, shape[0]).double()
    before = model(x)
    assert torch.allclose(before, nn.functional.linear(x, model[0].weight, model[0].bias))
    shake(model, 0.05)
    calls = []
    original = DataOp.kron
    monkeypatch.setattr(DataOp, "kron", lambda *args: calls.append(1) or original(*args))
    with torch.no_grad():
        live = model(x)
        assert calls, "nothing used the structure"
        wanted = reference.dense(method, tensors(model), model[0].weight, model[0].bias, x)
    assert torch.allclose(live, wanted)
    assert not torch.allclose(live, before)
    y = model(x)  # with gradients, in the training reading
    assert torch.allclose(y, wanted)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in weft.parameters(model))
    weft.merge(model, "default")
    assert torch.allclose(model(x), wanted)


def test_moka_takes_the_largest_divisors() -> None:
    t = tensors(attached(METHODS["moka"](sizes=(5, 100)), 12, 10))
    assert {k: tuple(v.shape) for k, v in t.items()} == {
        "gate": (2,), "A0": (5, 4), "B0": (2, 3), "A1": (10, 12), "B1": (1, 1),
    }  # fmt: skip
    with pytest.raises(TargetError, match="two terms or more"):
        attached(METHODS["moka"](sizes=(2,)), 12, 10)


def test_the_slices_of_a_ring_do_not_stay_equal() -> None:
    model = attached(METHODS["tensor_ring"](), 16, 16)
    x = torch.randn(8, 16).double()
    model(x).square().sum().backward()
    gradient = tensors(model)["T0"].grad.permute(0, 3, 1, 2).flatten(0, 1)  # [r r, n, n]
    assert all(not torch.allclose(g, gradient[0], rtol=1e-3) for g in gradient[1:])


def test_dota_at_full_rank_is_the_whole_weight() -> None:
    model = attached(METHODS["dota"](rank=1000), 12, 8)
    x = torch.randn(3, 12).double()
    with torch.no_grad():
        for p in weft.parameters(model):
            p.zero_()
        assert torch.allclose(model(x), model[0].bias.expand(3, -1))


def test_dota_drops_directions_for_good() -> None:
    method = METHODS["dota"](rank=8, tolerance=0.6, drop_every=2)
    model = attached(method, 12, 8)
    adapter = records(model)["default"].adapters["0"]
    forgotten: list[str] = []
    part = Part(adapter.site, adapter.tensors(), {}, lambda name, mask: forgotten.append(name))
    before = [p.clone() for p in weft.parameters(model)]
    with torch.no_grad():
        method.evolve([part], Progress(1, 10))  # not yet
        assert all(torch.equal(p, b) for p, b in zip(weft.parameters(model), before, strict=True))
        method.evolve([part], Progress(2, 10))
    assert sorted(forgotten) == ["core0", "core1", "core2"]
    core = adapter.tensors()["core0"]  # [1, o, i, R]
    dropped = core.flatten(0, -2).norm(dim=0) == 0
    assert 0 < dropped.sum() < len(dropped)
    model(torch.randn(4, 12).double()).square().sum().backward()
    assert not core.grad[..., dropped].any()
    assert core.grad[..., ~dropped].any()
    off = METHODS["dota"](rank=8)
    off.evolve([part], Progress(2, 10))  # without a tolerance it leaves everything as it is


def sizes_of(t: dict[str, Tensor]) -> dict[str, int]:
    """How many rows of each core right of a bond are in use."""
    return {k: int(c.flatten(1).any(1).sum()) for k, c in t.items() if k[0] in "AB" and k[1:] != "0"}


def test_lorettas_bonds_grow_where_the_loss_is_steepest() -> None:
    method = METHODS["loretta"](rank=4, bond=4, num_cores=2, growths=6)
    model = attached(method, 16, 16)
    adapter = records(model)["default"].adapters["0"]
    restarted: dict[str, Tensor] = {}
    part = Part(adapter.site, adapter.tensors(), {}, restarted.__setitem__)
    assert sizes_of(adapter.tensors()) == {"A1": 1, "A2": 1, "B1": 1, "B2": 0}
    optimizer = torch.optim.AdamW(weft.parameters(model), lr=0.05)
    x, target = torch.randn(40, 16).double(), torch.randn(40, 16).double()
    totals, losses = [], []
    for step in range(1, 25):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        slopes = {k: adapter.tensors()[k].grad for k in ("A1", "A2", "B1", "B2")}
        used = sizes_of(adapter.tensors())
        optimizer.step()
        with torch.no_grad():
            before = part.state["slopes"].clone() if "slopes" in part.state else torch.zeros(4).double()
            method.evolve([part], Progress(step, 24))
        now = part.state["used"]
        totals.append(int(now.sum()) - 4)
        grown = [k for k, n in zip(slopes, now, strict=True) if int(n) > max(used[k], 1)]
        if step > 4 and grown:  # by then every core has had a gradient
            seen = [b + slopes[k][used[k]].square().sum() for (k, b) in zip(slopes, before, strict=True) if used[k] < 4]
            room = [k for k in slopes if used[k] < 4]
            assert grown == [room[int(torch.stack(seen).argmax())]]
        for k, n in zip(slopes, now, strict=True):
            assert not adapter.tensors()[k][int(n) :].any()
            assert restarted[k][int(n) :].all()
            assert not restarted[k][: int(n)].any()
    assert totals == [min(int(6 * 2 * step / 24), 6) for step in range(1, 25)]
    assert sum(sizes_of(adapter.tensors()).values()) == 10
    assert losses[-1] < losses[8] < losses[0]
    assert METHODS["loretta"]().evolves() is False


def test_loretta_forms_fit_their_sites() -> None:
    LoRETTA = METHODS["loretta"]
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    with pytest.raises(TargetError, match="form='adapter' does not fit a site of kind 'conv'"):
        weft.attach(model, LoRETTA(form="adapter"), ["0"])
    count = sum(p.numel() for p in weft.parameters(attached(LoRETTA(), 768, 768)))
    # bonds 1, 5, 5, 5, 1 over 8, 8, 12 and the rank, for A and B: LoRA of this rank has 12 288
    assert count == 2 * (8 * 5 + 5 * 8 * 5 + 5 * 12 * 5 + 5 * 8)


def test_a_tensor_product_reaches_past_its_length() -> None:
    t = tensors(attached(METHODS["tensor_product"](rank=2, order=3, num_terms=4), 30, 8))
    assert t["a"].shape == (3, 4, 2, 4)  # 4^3 = 64 entries, of which 30 are used
    assert t["b"].shape == (3, 4, 2, 2)


def test_compacter_trains_one_expert_at_a_time() -> None:
    method = METHODS["compacter"](reduction_factor=2, division=2, num_experts=3)
    model = attached(method, 8, 8)
    shake(model)
    t, x = tensors(model), torch.randn(4, 8).double()
    layer = model[0]

    def with_expert(e: int) -> Tensor:
        one = {k: v[e : e + 1] if k in ("Ul", "Ur", "u") else v for k, v in t.items()}
        single = METHODS["compacter"](reduction_factor=2, division=2)
        return compacter_reference.dense(single, one, layer.weight, layer.bias, x)

    each = [with_expert(e) for e in range(3)]
    model.train()
    torch.manual_seed(0)
    found = set()
    for _ in range(30):
        y = model(x)
        matches = [e for e in range(3) if torch.allclose(y, each[e])]
        assert len(matches) == 1
        found |= {*matches}
    assert found == {0, 1, 2}
    model.eval()
    assert torch.allclose(model(x), compacter_reference.dense(method, t, layer.weight, layer.bias, x))
    with pytest.raises(TargetError, match="division=4 does not divide 8 channels and a bottleneck of 2"):
        attached(METHODS["compacter"](reduction_factor=4), 8, 8)


@torch.no_grad()
def test_dota_packs_its_bonds_by_what_they_hold(tmp_path) -> None:
    method = METHODS["dota"](rank=4, choose="weight")
    torch.manual_seed(0)
    left = torch.linalg.qr(torch.randn(30, 30))[0]  # a weight whose two cuts are not alike
    model = nn.Sequential(nn.Linear(24, 30)).double().eval()
    fall = torch.diag(torch.logspace(0, -3, 24))
    model[0].weight.copy_((left[:, :24] @ fall @ torch.linalg.qr(torch.randn(24, 24))[0]).double())
    weight = model[0].weight.clone()
    plan = weft.attach(model, method, ["0"])
    bonds = plan.sites[0].method.bonds
    rows, columns = method._sizes(plan.sites[0].site)
    sizes = [m * n for m, n in zip(rows, columns, strict=True)]
    squares = [torch.linalg.svdvals(unfolded(weight, rows, columns, k)).square().cumsum(0).tolist() for k in (1, 2)]
    budget = 4 * sizes[0] + 16 * sizes[1] + 4 * sizes[2]
    best = max(
        (squares[0][a - 1] + squares[1][b - 1], -cost, a, b)
        for a in range(1, len(squares[0]) + 1)
        for b in range(1, len(squares[1]) + 1)
        if (cost := a * sizes[0] + a * b * sizes[1] + b * sizes[2]) <= budget
    )
    assert bonds == best[2:]
    assert [tuple(records(model)["default"].adapters["0"].tensors()[f"core{k}"].shape[::3]) for k in range(3)] == [
        (1, bonds[0]), bonds, (bonds[1], 1)
    ]  # fmt: skip
    shake(model)
    x = torch.randn(3, 24).double()
    wanted = model(x)
    weft.save(model, tmp_path)
    again = nn.Sequential(nn.Linear(24, 30)).double().eval()
    again.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    assert weft.load(again, tmp_path).sites[0].method.bonds == bonds
    assert torch.equal(again(x), wanted)


def unfolded(w: Tensor, rows: tuple[int, ...], columns: tuple[int, ...], k: int) -> Tensor:
    """The matrix of one cut of the chain."""
    n = len(rows)
    axes = [axis for i in range(n) for axis in (i, n + i)]
    size = torch.Size([*rows[:k], *columns[:k]]).numel()
    return w.reshape(*rows, *columns).permute(axes).reshape(size, -1)


def test_bonds_are_one_fewer_than_cores() -> None:
    with pytest.raises(TargetError, match="3 cores have 2 bonds"):
        attached(METHODS["dota"](bonds=(2,)), 12, 8)
    model = attached(METHODS["dota"](bonds=(2, 1000)), 12, 8)
    assert tensors(model)["core0"].shape[-1] == 2
