"""Starts that make up for what quantising loses, against their papers' equations written densely."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import weft
from weft.adapter import AdapterFileError, fingerprint
from weft.attach import attach_plan, use
from weft.errors import RecipeError
from weft.interop.folder import load, save
from weft.quantise import Originals, quantise_model
from weft.quantise.budget import Grid
from weft.quantise.checkpoint import write_quantised
from weft.recipe import Recipe
from weft.targets import resolve
from weft.tune.repair import check_repair, correct, start_statistics
from weft.tune.repair.apiq import Moments, fit

RANK = 4


def base(scheme: str = "nf4", **options: object) -> tuple[nn.Module, Originals]:
    """A small network whose weights have the outliers and the low-rank parts that trained ones have."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64, bias=False))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight += torch.randn(layer.out_features, 3) @ torch.randn(3, layer.in_features) * 0.05
            layer.weight *= torch.exp(torch.randn(layer.out_features, 1))
    originals = Originals()
    quantise_model(model, scheme, originals=originals, **options)
    return model, originals


def started(model: nn.Module, originals: Originals, method: weft.Method, batches: object = ()) -> dict[str, Tensor]:
    """Attach with what the start needs; W by address."""
    plan = resolve(model, method, ["0", "2"])
    weights = {path: originals.weight(path).clone() for path in originals.layers}
    attach_plan(model, plan, statistics=start_statistics(model, plan, originals, batches))
    use(model, "default")
    return weights


def error(model: nn.Module, address: str, weight: Tensor) -> float:
    return (model.weave.seats[address].value("default").dense(weight) - weight).norm().item()


def rounding_error(model: nn.Module, address: str, weight: Tensor) -> float:
    return (model.weave.seats[address].weight() - weight).norm().item()


def truncated(residual: Tensor, rank: int = RANK) -> Tensor:
    u, s, v = torch.linalg.svd(residual, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def nf4(weight: Tensor) -> Tensor:
    """Quantised and back, by the library itself."""
    functional = pytest.importorskip("bitsandbytes").functional
    packed = functional.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    return functional.dequantize_4bit(*packed)


def data(rows: int = 64) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(64, 64, generator=generator)
    return [(torch.randn(rows, 64, generator=generator) @ mixed,) for _ in range(3)]


class Loss(nn.Module):
    """A network that returns a loss, as the gradient starts need."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).square().mean()


def test_loftq_of_one_round_is_the_svd_of_the_residual_and_leaves_the_codes() -> None:
    model, originals = base()
    before = model[0].weight.data.clone()
    weights = started(model, originals, weft.LoRA(rank=RANK, start="loftq"))
    assert torch.equal(model[0].weight.data, before)
    for address, w in weights.items():
        q = nf4(w)
        expected = q + truncated(w - q)
        torch.testing.assert_close(model.weave.seats[address].value("default").dense(w), expected, atol=1e-5, rtol=1e-4)
        assert error(model, address, w) < rounding_error(model, address, w)


def test_loftq_alternates_as_the_paper_writes_it() -> None:
    model, originals = base()
    weights = started(model, originals, weft.LoRA(rank=RANK, alpha=3.0, start="loftq", start_rounds=4))
    for address, w in weights.items():
        low = torch.zeros_like(w)
        for _ in range(4):
            q = nf4(w - low)
            low = truncated(w - q)
        seat = model.weave.seats[address]
        torch.testing.assert_close(seat.weight(), q, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(seat.value("default").dense(w), q + low, atol=2e-3, rtol=1e-2)
        assert error(model, address, w) < (nf4(w) - w).norm()


def test_lq_lora_keeps_the_least_error() -> None:
    errors = []
    for rounds in (1, 2, 8):
        model, originals = base()
        weights = started(model, originals, weft.LoRA(rank=RANK, start="lq-lora", start_rounds=rounds))
        errors.append([error(model, a, w) for a, w in weights.items()])
        for (a, w), e in zip(weights.items(), errors[-1], strict=True):
            assert e < (nf4(w) - w).norm(), a
    for one, two, many in zip(*errors, strict=True):
        assert many <= two * 1.0001 <= one * 1.0002
    w, low = weights["0"], truncated(weights["0"])
    assert errors[0][0] == pytest.approx((w - low - nf4(w - low)).norm().item(), rel=1e-3)


def test_lq_lora_with_fisher_is_better_where_the_loss_is_steep() -> None:
    weighted = {}
    for start in ("lq-lora", "lq-lora-fisher"):
        model, originals = base()
        whole = Loss(model)
        originals.follow(whole)
        batches = [(x * torch.logspace(-2, 1, 64),) for (x,) in data()]
        plan = resolve(whole, weft.LoRA(rank=RANK, start=start), ["inner.0"])
        w = originals.weight("inner.0").clone()
        with originals.restored(whole):
            fisher = torch.zeros_like(w)
            for (x,) in batches:
                for row in x:
                    w_ = whole.inner[0].weight.requires_grad_()
                    fisher += torch.autograd.grad(whole(row[None]), w_)[0].square()
                    w_.requires_grad_(False)
        statistics = start_statistics(whole, plan, originals, batches)
        if start == "lq-lora-fisher":
            scale = fisher.mean() / statistics["inner.0"]["fisher"].mean()
            torch.testing.assert_close(statistics["inner.0"]["fisher"] * scale, fisher, atol=1e-8, rtol=1e-3)
        attach_plan(whole, plan, statistics=statistics)
        value = whole.weave.seats["inner.0"].value("default").dense(w)
        weighted[start] = (fisher.sqrt() * (value - w)).norm().item()
    assert weighted["lq-lora-fisher"] < weighted["lq-lora"]


def test_a_layer_that_was_left_alone_starts_from_nothing() -> None:
    model, originals = base()
    head = nn.Linear(64, 8)
    whole = nn.Sequential(model, head)
    originals.follow(whole)
    plan = resolve(whole, weft.LoRA(rank=RANK, start="loftq"), ["0.0", "1"])
    attach_plan(whole, plan, statistics=start_statistics(whole, plan, originals, ()))
    seat = whole.weave.seats["1"]
    assert torch.equal(seat.value("default").dense(head.weight), head.weight)
    assert seat.adapters["default"].tensors()["A"].any()


def test_apiq_beats_rounding_and_factors_alone() -> None:
    torch.manual_seed(0)
    w = torch.randn(48, 64) * torch.exp(torch.randn(48, 1))
    x = torch.randn(500, 64) @ torch.randn(64, 64)
    xq = x + 0.1 * torch.randn(500, 64)
    seen = Moments(x.T @ x / 500, xq.T @ x / 500, xq.T @ xq / 500)
    direct = (x @ w.T - xq @ (0.9 * w).T).square().sum() / 500
    torch.testing.assert_close(seen.loss(w, 0.9 * w), direct, rtol=1e-4, atol=1e-2)
    rounded = seen.loss(w, Grid(2, 32).rounded(w)).item()
    losses = []
    for steps in (0, 20, 200):
        a, b, low, high = fit(w, seen, 2, 32, rank=RANK, steps=steps, generator=torch.Generator().manual_seed(0))
        layer = weft.kinds.packed.GPTQLinear.of(w, None, 2, 32)
        layer.write(*weft.kinds.packed.round_to_grid(w, 2, 32, low, high))
        losses.append(seen.loss(w, layer.dequantize() + b @ a).item())
    assert rounded >= losses[0] >= losses[1] >= losses[2]
    assert losses[2] < 0.8 * rounded
    assert (high < 1).all()


def test_apiq_through_layers_hands_on_what_the_quantised_ones_compute() -> None:
    outputs = {}
    x = data(32)
    for start in ("kaiming", "apiq"):
        model, originals = base("packed-int2", group_size=32)
        with originals.restored(model):
            full = model(x[0][0]).detach()
        started(model, originals, weft.LoRA(rank=RANK, start=start), [{"input": b[0]} for b in x])
        outputs[start] = (model(x[0][0]) - full).square().mean().item()
    assert outputs["apiq"] < 0.7 * outputs["kaiming"]


def test_correction_brings_the_quantised_base_back_to_the_full_one() -> None:
    model, originals = base("packed-int2", group_size=32)
    plan = resolve(model, weft.LoRA(rank=RANK), ["0", "2"])
    attach_plan(model, plan)
    use(model, "default")
    batches = [{"input": b[0] * 0.1} for b in data(16)]
    losses = correct(model, "default", originals, batches, steps=30, learning_rate=5e-3)
    assert len(losses) == 30
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    with originals.restored(model):
        assert type(model[0]) is nn.Linear
    assert type(model[0]).__name__ == "GPTQLinear"


def qwha_error(rank: int, batches: list[tuple[Tensor]]) -> tuple[float, float, nn.Module]:
    """Error of the first layer's outputs, without and with the repair."""
    model, originals = base()
    weights = started(model, originals, weft.methods()["qwha"](rank=rank, scaling=0.5, start="repair"), batches)
    x = torch.cat([b[0] for b in batches])
    seat = model.weave.seats["0"]
    gaps = [seat.weight() - weights["0"], seat.value("default").dense(weights["0"]) - weights["0"]]
    plain, repaired = ((x @ gap.T).norm().item() for gap in gaps)
    return plain, repaired, model


def test_qwha_repairs_more_with_more_entries() -> None:
    found = [qwha_error(rank, data()) for rank in (2, 8, 20)]
    assert found[0][0] > found[0][1] > found[1][1] > found[2][1]
    assert found[2][1] < 0.6 * found[2][0]


def test_qwha_gives_rows_entries_by_their_error_and_refits_their_values() -> None:
    from weft.core.hadamard import allocate, matrix

    batches = data()
    model, originals = base()
    w, q = originals.weight("0"), nf4(originals.weight("0"))
    started(model, originals, weft.methods()["qwha"](rank=4, start="repair"), batches)
    t = model.weave.seats["0"].adapters["default"].tensors()
    h, x = matrix(64, w), torch.cat([b[0] for b in batches])
    torch.testing.assert_close(h @ h, torch.eye(64), atol=1e-5, rtol=0)
    norms = (w - q).norm(dim=1)
    counts = torch.bincount(t["places"] // 64, minlength=96)
    assert counts.sum() == 4 * (96 + 64) == len(t["values"])
    assert torch.corrcoef(torch.stack([counts.float(), norms]))[0, 1] > 0.95
    row = int(counts.argmax())
    mine = t["places"] // 64 == row
    basis = (x @ h)[:, (t["places"][mine] % 64).long()]
    damped = basis.T @ basis / len(x) + 1e-4 * (x.square().sum() / len(x) / 64) * torch.eye(int(mine.sum()))
    expected = torch.linalg.solve(damped, basis.T @ (x @ (w - q)[row]) / len(x))
    torch.testing.assert_close(t["values"][mine], expected, atol=5e-2 * expected.abs().max().item(), rtol=0)
    assert allocate(torch.ones(3, 4), 12).tolist() == [4, 4, 4]
    assert allocate(torch.tensor([[9.0, 9.0], [0.1, 0.0], [0.0, 0.0]]), 4).tolist() == [2, 1, 1]


def test_without_the_weights_before_quantising_the_start_is_refused() -> None:
    model, _ = base()
    with pytest.raises(ValueError, match="the weight before quantising is not at hand"):
        weft.attach(model, weft.LoRA(rank=RANK, start="loftq"), ["0"])
    with pytest.raises(ValueError, match="repairs a quantised linear layer"):
        weft.attach(nn.Sequential(nn.Embedding(8, 8)), weft.LoRA(rank=RANK, start="loftq"), ["0"])


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"method": {"name": "lora", "start": "loftq"}}, "base.quantize is not given"),
        ({"train": {"correct_steps": 3}}, "correct_steps=3 repairs what quantising loses"),
        ({"base": {"quantize": "int8"}, "method": {"name": "lora", "start": "lq-lora"}}, "cannot be stored with them"),
        ({"base": {"quantize": "nf4"}, "method": {"name": "lora", "start": "apiq"}}, "nf4 has no such grid"),
        (
            {"base": {"quantize": "torchao-int4"}, "method": {"name": "lora", "start": "loftq", "start_rounds": 2}},
            "start_rounds: 1",
        ),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_loaded(section: dict, said: str) -> None:
    recipe = Recipe(**{"data": {"train": "rows.jsonl"}, **section})
    spec = dict(recipe.method)
    method = {"lora": weft.LoRA}[spec.pop("name")](**spec)
    with pytest.raises(RecipeError, match=said):
        check_repair(recipe, method)


@pytest.mark.parametrize("scheme", ["nf4", "packed-int4"])
def test_the_fingerprint_notices_codes_that_are_written_anew(scheme: str) -> None:
    model, _ = base(scheme)
    weft.attach(model, weft.LoRA(rank=RANK), ["0"])
    before = fingerprint(model)["codes"]
    assert before is not None
    assert fingerprint(model)["codes"] == before
    model.weave.seats["0"].write_weight(torch.randn(96, 64))
    assert fingerprint(model)["codes"] != before


def test_the_adapter_belongs_to_the_codes_that_it_repairs(tmp_path: Path) -> None:
    llama = weft.load_base("pico")[0]
    originals = Originals()
    full = copy.deepcopy(llama)
    quantise_model(llama, "nf4", originals=originals)
    plain = copy.deepcopy(llama)
    plan = resolve(llama, weft.LoRA(rank=RANK, start="lq-lora"), layers="0-1")
    attach_plan(llama, plan, statistics=start_statistics(llama, plan, originals, ()))
    use(llama, "default")
    ids = torch.arange(12).view(1, 12)
    live = llama(ids).logits.detach()
    place = save(llama, tmp_path / "adapter")
    assert (place / "adapter_config.json").exists(), "plain LoRA against the quantised base is a PEFT folder"
    for other, why in ((plain, "holds other codes"), (full, "is not quantised")):
        with pytest.raises(AdapterFileError, match=why):
            load(other, place)
    write_quantised(llama, tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    load(again, place)
    assert torch.equal(again(ids).logits, live)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), place
    )
    torch.testing.assert_close(theirs(ids).logits, live, atol=1e-4, rtol=1e-4)
