"""Bottleneck adapters in training, where the point of most of them is, and on whole models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.common.language import close, generate, ids, llama, padded
from weft.attach import records
from weft.core import Progress
from weft.core.evolve import Part
from weft.core.penalty import weighted
from weft.core.pruning import synflow


def method(name: str, **options: Any) -> weft.Method:
    return weft.methods()[name](**options)


def shaken(model: Any, std: float = 0.3, name: str = "default") -> Any:
    with torch.no_grad():
        for p in weft.parameters(model, name):
            p.normal_(std=std)
    return model


def own(model: nn.Module, address: str) -> dict[str, Tensor]:
    return records(model)["default"].adapters[address].tensors()


def parts(model: nn.Module, restarted: list[Any]) -> list[Part]:
    found = []
    for adapter in records(model)["default"].adapters.values():
        tensors = {**dict(adapter.named_parameters(recurse=False)), **dict(adapter.named_buffers(recurse=False))}
        found.append(Part(adapter.site, tensors, {}, lambda name, mask: restarted.append((name, mask))))
    return found


def test_a_gate_weighs_every_token_or_the_mean_of_its_row() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    for gate in ("token", "row"):
        model = nn.Sequential(nn.Sequential(nn.Linear(6, 6)))
        weft.attach(model, method("bottleneck", width=3, gate=gate), ["re:0"])
        shaken(model, 1.0)
        plain = nn.Sequential(nn.Sequential(nn.Linear(6, 6)))
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
        weft.attach(plain, method("bottleneck", width=3), ["re:0"])
        t = own(model, "0")
        with torch.no_grad():
            for key, value in own(plain, "0").items():
                value.copy_(t[key])
            with weft.using(plain, None):
                base = plain(x)
            g = torch.sigmoid(base @ t["gate"].T + t["gate_bias"])
            assert g.std() > 0.05
            close(model(x) - base, (plain(x) - base) * (g if gate == "token" else g.mean(1, keepdim=True)))
    with pytest.raises(ValueError, match="sure to see rows"):
        weft.attach(nn.Sequential(nn.Linear(4, 4)), method("bottleneck", gate="row"), ["0"])


def test_r_adapter_drops_rows_in_training_and_keeps_their_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6)).train()
    weft.attach(model, method("r_adapter", drop=0.25, alpha=0.5), ["0"])
    shaken(model)
    x = torch.randn(1, 3, 6)
    with torch.no_grad():
        with weft.using(model, None):
            base = model(x)[0]
        whole = (model.eval()(x)[0] - base) / 0.5
        found = model.train()(x.expand(4000, -1, -1)) - base
    dropped = found.abs().amax((1, 2)) < 1e-6
    assert abs(dropped.float().mean() - 0.25) < 0.03
    close(found[~dropped][0], whole / 0.75)
    close(found.mean(0), whole, 0.05)


def test_r_adapter_ends_as_the_average_of_its_steps() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    r = method("r_adapter", ema=0.9)
    weft.attach(model, r, ["0"])
    (part,) = parts(model, [])
    seen = []
    for step in range(1, 6):
        with torch.no_grad():
            part.tensors["A"].fill_(float(step))
            before = part.tensors["A"].clone()
            r.evolve([part], Progress(step, 5))
        seen.append(float(step))
        if step < 5:
            assert torch.equal(part.tensors["A"], before), "training goes on from where it is"
    weights = [0.9 ** (5 - step) for step in range(1, 6)]
    wanted = sum(w * s for w, s in zip(weights, seen, strict=True)) / sum(weights)
    close(part.tensors["A"], torch.full((4, 4), wanted))


def test_mosa_trains_one_piece_a_step_and_is_whole_afterwards() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12)).train()
    weft.attach(model, method("mosa", pieces=3, width=6, placement="parallel", cut="both"), ["0"])
    first = own(model, "0")["down"].detach().clone()
    shaken(model)
    t, x = own(model, "0"), torch.randn(50, 12)
    assert [(t["down_piece"] == i).sum().item() for i in range(3)] == [24, 24, 24]
    seen = set()
    for _ in range(12):
        model.zero_grad()
        model(x).square().sum().backward()
        for name in ("down", "up"):
            trained = t[f"{name}_piece"][t[name].grad != 0].unique().tolist()
            assert len(trained) == 1, "one piece of each matrix learns"
            seen.add((name, trained[0]))
    assert len(seen) == 6
    whole = model.eval()(x)
    plain = nn.Sequential(nn.Linear(12, 12))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    weft.attach(plain, method("bottleneck", width=6, placement="parallel", activation="relu", scale=0.1), ["0"])
    with torch.no_grad():
        for key, value in own(plain, "0").items():
            value.copy_({"up": t["up"] / 3, "down": first + (t["down"] - first) / 3}.get(key, t[key]))
    close(whole, plain(x))


def test_mosa_cuts_the_upper_matrix_alone_unless_told_otherwise() -> None:
    model = nn.Sequential(nn.Linear(12, 12)).train()
    weft.attach(model, method("mosa", pieces=3, width=6), ["0"])
    shaken(model)
    t = own(model, "0")
    model(torch.randn(50, 12)).square().sum().backward()
    assert (t["up"].grad != 0).sum() <= 24
    assert (t["down"].grad != 0).sum() > 24
    assert "down_piece" not in t


def test_mosa_wants_its_pieces_to_agree() -> None:
    torch.manual_seed(0)
    gradients = []
    for consistency in (0.0, 1.0):
        model = nn.Sequential(nn.Linear(8, 8)).train()
        with torch.no_grad():
            model[0].weight.fill_(0.1)
        weft.attach(model, method("mosa", pieces=2, width=4, consistency=consistency), ["0"])
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in weft.parameters(model):
                p.copy_(torch.randn(p.shape, generator=generator))
        t, found = own(model, "0"), torch.zeros(8, 4)
        torch.manual_seed(2)
        for _ in range(8):
            with weighted(1.0):
                (0.0 * model(torch.randn(5, 8)).sum()).backward()
            found += t["up"].grad
        gradients.append(found)
    assert gradients[0].abs().max() == 0
    assert gradients[1].abs().max() > 0


def test_sparse_adapter_prunes_all_sites_together_by_what_the_loss_says() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    sparse = method("sparse_adapter", width=4, sparsity=0.75, score_steps=3)
    weft.attach(model, sparse, ["0", "1"])
    x, y, restarted = torch.randn(64, 10), torch.randn(64, 10), []
    optimizer = torch.optim.SGD(weft.parameters(model), lr=0.05)
    each = parts(model, restarted)
    for step in range(1, 6):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        scores = [(p.tensors[n].grad * p.tensors[n]).abs().detach() for p in each for n in ("down", "up")]
        with torch.no_grad():
            sparse.evolve(each, Progress(step, 5))
        masks = [p.tensors[f"{n}_mask"] for p in each for n in ("down", "up")]
        if step < 3:
            assert all(bool(m.all()) for m in masks)
        if step == 3:
            flat = torch.cat([s.flatten() for s in scores])
            wanted = flat >= flat.sort(descending=True).values[39]  # a quarter of 160
            assert torch.equal(torch.cat([m.flatten() for m in masks]).bool(), wanted)
            assert [name for name, _ in restarted] == ["down", "up"] * 2
    fixed = [m.clone() for m in masks]
    assert all(torch.equal(a, b) for a, b in zip(fixed, masks, strict=True))
    model.zero_grad()
    model(x).square().sum().backward()
    for part in each:
        for name in ("down", "up"):
            assert not part.tensors[name].grad[part.tensors[f"{name}_mask"] == 0].any()


def test_synflow_keeps_what_most_flows_through_in_rounds() -> None:
    torch.manual_seed(0)
    pairs = [(torch.randn(3, 5), torch.randn(6, 3)), (0.3 * torch.randn(3, 5), torch.randn(6, 3))]
    masks = synflow(pairs, 0.25)
    assert sum(int(m.sum()) for both in masks for m in both) == round(0.25 * 66)
    once = []
    for down, up in pairs:  # 1^T |U| |D| 1, by the gradient of its own sum
        d, u = (t.abs().requires_grad_() for t in (down, up))
        (u @ d).sum().backward()
        once += [(d.grad * d).detach().flatten(), (u.grad * u).detach().flatten()]
    first = synflow(pairs, 65 / 66)
    assert torch.cat(once).argmin() == torch.cat([m.flatten() for both in first for m in both]).argmin()
    for (down, up), (of_down, of_up) in zip(pairs, masks, strict=True):
        alive = (of_down * down).abs().sum(1) > 0
        assert torch.equal(alive, (of_up * up).abs().sum(0) > 0), "nothing is kept that leads nowhere"


def test_rounds_keep_nothing_that_leads_nowhere() -> None:
    torch.manual_seed(0)  # in one round, a channel between keeps an entry of one side alone
    pairs = [(torch.randn(3, 5), torch.randn(6, 3)), (0.3 * torch.randn(3, 5), torch.randn(6, 3))]
    for of_down, of_up in synflow(pairs, 0.05):
        assert torch.equal(of_down.any(1), of_up.any(0))


def test_sparse_adapter_prunes_by_flow_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    sparse = method("sparse_adapter", width=4, sparsity=0.75, score="synflow", score_steps=2)
    weft.attach(model, sparse, ["0", "1"])
    shaken(model)
    each = parts(model, [])
    with torch.no_grad():
        sparse.evolve(each, Progress(1, 5))
        assert all(bool(p.tensors[f"{n}_mask"].all()) for p in each for n in ("down", "up"))
        sparse.evolve(each, Progress(2, 5))
    assert sum(int(p.tensors[f"{n}_mask"].sum()) for p in each for n in ("down", "up")) == 40


def test_the_largest_of_the_start_are_kept_by_magnitude() -> None:
    model = nn.Sequential(nn.Linear(10, 10))
    weft.attach(model, method("sparse_adapter", width=4, sparsity=0.5, score="magnitude"), ["0"])
    t = own(model, "0")
    kept, gone = (t["down"][t["down_mask"] == m].abs() for m in (1, 0))
    assert kept.numel() == gone.numel() == 20
    assert kept.min() >= gone.max()


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_invertible_adapters_change_the_input_and_undo_it_at_the_output(tied: bool) -> None:
    torch.manual_seed(0)
    model, rows = llama(tie_word_embeddings=tied), ids()
    plan = weft.attach(model, method("invertible"), tied="separate")
    assert [s.site.address for s in plan.sites] == ["model.embed_tokens", "lm_head"]
    shaken(model)
    table, hidden = model.model.embed_tokens, model.model.layers
    with weft.using(model, None):
        base = table(rows)
    changed = table(rows)
    assert (changed - base).abs().max() > 0.05
    head = nn.functional.linear(base, model.lm_head._parameters["weight"])
    close(model.lm_head(changed), head)  # what went in comes out, whatever the network in between
    assert plan.num_parameters == sum(p.numel() for p in weft.parameters(model)) > 0
    batch, copy_ = padded(ids(3), (0, 2, 1)), copy.deepcopy(model)
    weft.use(model, ["default", None, "default"])
    mixed = model(**batch).logits
    weft.use(model, "default")
    close(mixed[0], model(**batch).logits[0])
    weft.use(model, None)
    close(mixed[1, 2:], model(**batch).logits[1, 2:])
    assert len(hidden) == 3
    weft.use(copy_, "default")
    assert generate(copy_, batch).shape == (3, 13)


def test_a_tied_embedding_is_refused_until_it_is_said_how() -> None:
    with pytest.raises(ValueError, match="tied='separate'"):
        weft.attach(llama(tie_word_embeddings=True), method("invertible"))


def test_snnk_trains_far_fewer_numbers_than_a_layer_and_keeps_its_features() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    plan = weft.attach(model, method("snnk", num_features=8), ["0"])
    assert plan.num_parameters == 64 * 8 + 64
    t = own(model, "0")
    gram = t["G"] @ t["G"].T
    close(gram, gram.diag().diag(), 1e-3)
    assert 6.0 < t["G"].norm(dim=1).mean() < 10.0  # as long as Gaussian rows of 64 numbers


@pytest.mark.parametrize("name", ["bottleneck", "mosa", "sparse_adapter", "snnk", "r_adapter"])
def test_each_learns_a_task(name: str) -> None:
    torch.manual_seed(0)
    options = {"snnk": {"num_features": 32}, "r_adapter": {"drop": 0.1}}.get(name, {"width": 8})
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(128, 16)
    y = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))(x).detach() * 3
    weft.attach(model, method(name, **options), ["0", "2"])
    optimizer, losses = torch.optim.Adam(weft.parameters(model), lr=0.02), []
    for train in [True] * 150 + [False]:
        model.train(train)
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0], (losses[0], losses[-1])


class Counted(nn.Module):
    """A token-wise block that notes how many tokens it was run for."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.seen = nn.Linear(6, 12), nn.Linear(12, 6), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[:2])
        return self.down(torch.relu(self.up(x)))


def test_coda_runs_its_block_for_the_chosen_tokens_only() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Counted()), torch.randn(3, 10, 6)
    base = model(x)
    weft.attach(model, method("coda", capacity=0.3, width=4), ["re:0"])
    model[0].seen.clear()
    found = model(x)
    assert model[0].seen == [(3, 3)]
    router = own(model, "0")["router"]
    chosen = (x @ router[0]).topk(3).indices
    ratio = (found / base).mean(-1)  # a fresh adapter gives zero: what is left is the weight of each token
    left = torch.zeros(3, 10).scatter(1, chosen, 1.0)
    assert ((ratio > 0.05) == left.bool()).all()
    assert (found[left == 0] == 0).all()
    weft.detach(model)
    weft.attach(model, method("coda", capacity=1.0), ["re:0"])
    close(model(x), base)


def test_coda_learns_which_tokens_need_the_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Counted())
    with torch.no_grad():
        model[0].down.weight.normal_()
    x = torch.randn(64, 8, 6)
    heavy = x[..., 0] > 0.5
    wanted = torch.where(heavy[..., None], model(x).detach(), 0.0)
    weft.attach(model, method("coda", capacity=0.5, width=2, epsilon=0.3), ["re:0"])
    router = own(model, "0")["router"]

    def right() -> float:
        k = heavy.sum(1, keepdim=True)
        order = (x @ router[0]).argsort(1, descending=True).argsort(1)
        return ((order < k) == heavy).float().mean().item()

    before, optimizer = right(), torch.optim.Adam(weft.parameters(model), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        (model(x) - wanted).square().mean().backward()
        optimizer.step()
    assert before < 0.75
    assert right() > 0.85


def test_coda_refuses_blocks_in_which_tokens_see_each_other() -> None:
    for target in ("attention-blocks", r"re:.*\.\d+"):
        with pytest.raises(ValueError, match="tokens see each other"):
            weft.attach(llama(), method("coda"), target)
    model, batch = llama(), padded(ids(3), (0, 2, 1))
    plan = weft.attach(model, method("coda", capacity=0.5, width=4))
    assert {s.site.address.rsplit(".", 1)[-1] for s in plan.sites} == {"mlp"}
    assert model(**batch).logits.isfinite().all()
