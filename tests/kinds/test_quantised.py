"""Quantised bases: read through their own forward, merged by re-quantising, restored to the very bits."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from weft.adapter import fingerprint
from weft.attach import AdapterError
from weft.errors import MissingExtra
from weft.quantise import GROUPED, SCHEMES, quantise_model

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


METHODS = {
    "lora": lambda: weft.LoRA(rank=4),
    "dora": lambda: weft.DoRA(rank=4),
    "ia3": weft.IA3,
    "full": weft.Full,
    "shira": weft.SHiRA,
}
ERROR = {
    "nf4": 0.1, "fp4": 0.15, "int8": 0.01, "torchao-int8": 0.01, "torchao-int4": 0.05,
    "packed-int8": 0.01, "packed-int4": 0.05, "packed-int3": 0.1, "packed-int2": 0.3,
}  # fmt: skip
"""The largest error of a re-quantised weight, and a third of the relative error of outputs."""


def quantise(model: nn.Module, scheme: str) -> None:
    quantise_model(model, scheme, group_size=32 if scheme in GROUPED else None)


@pytest.fixture(params=["nf4", "int8", "torchao-int8", "torchao-int4", "packed-int3"])  # one of every kind of seat
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


def net(scheme: str, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    model = Net().to(dtype)
    quantise(model, scheme)
    return model


def fill(model: nn.Module, name: str | None = None, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in weft.parameters(model, name):
            p += 0.05 * torch.randn(p.shape, generator=generator)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Everything that a layer stores, codes and scales, as plain tensors."""
    found = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or "adapters" in name:
            continue
        inner = getattr(value, "__tensor_flatten__", None)
        parts = inner()[0] if inner is not None else []
        found.update({f"{name}.{p}": getattr(value, p).clone() for p in parts} or {name: value.detach().clone()})
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_base_is_known_by_its_codes(scheme: str) -> None:
    """Of every layout: torchao's opaque one for CPUs cannot be dequantised."""
    one, again = net(scheme), net(scheme)
    other = Net()
    quantise(other, scheme)
    assert fingerprint(one)["codes"] == fingerprint(again)["codes"] != fingerprint(other)["codes"]


@pytest.mark.parametrize("method", METHODS)
def test_starts_at_the_base_learns_merges_and_comes_back(scheme: str, method: str) -> None:
    model = net(scheme)
    kinds = [type(m) for m in model.children()]
    x = torch.randn(3, 7, 64)
    base, before = model(x).detach(), bits(model)
    weft.attach(model, METHODS[method](), ["first", "second"])
    torch.testing.assert_close(model(x), base, atol=0.02 if method == "full" else 1e-5, rtol=1e-4)
    fill(model)
    inner = x.clone().requires_grad_()
    live = model(inner)
    live.sum().backward()
    assert inner.grad is not None
    assert inner.grad.abs().max() > 0
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in weft.parameters(model))
    live = live.detach()
    with torch.no_grad():
        assert torch.allclose(model(x), live, atol=1e-6)
        errors = weft.merge(model, "default")
        assert errors.keys() == {"first", "second"}
        assert 0 < max(errors.values()) < ERROR[scheme]
        distance = (model(x) - live).norm() / live.norm()
        assert distance < 3 * ERROR[scheme]
        assert not same(bits(model), before)
        weft.unmerge(model)
        assert same(bits(model), before)
        assert torch.allclose(model(x), live, atol=1e-6)
        weft.use(model, None)
        assert torch.equal(model(x), base)
        weft.detach(model)
        assert [type(m) for m in model.children()] == kinds
        assert torch.equal(model(x), base)


def test_weight_is_what_the_forward_multiplies_by(scheme: str) -> None:
    model = net(scheme)
    weft.attach(model, weft.LoRA(rank=2), "second")
    weight = model.weave.seats["second"].weight()
    assert weight.shape == (64, 96)
    assert weight.dtype == torch.float32
    x = torch.randn(5, 96)
    expected = F.linear(x, weight)
    atol = 0.05 if scheme == "int8" else 1e-5  # bitsandbytes' int8 quantises its input too
    torch.testing.assert_close(model.second(x), expected, atol=atol, rtol=1e-4)


def test_merge_error_is_the_distance_to_the_wanted_weight(scheme: str) -> None:
    model = net(scheme)
    weft.attach(model, weft.LoRA(rank=2), "first")
    fill(model)
    seat = model.weave.seats["first"]
    wanted = seat.value("default").weight
    error = weft.merge(model, "default")["first"]
    assert error == pytest.approx((seat.weight() - wanted).abs().max().item())


def test_rows_of_a_batch(scheme: str) -> None:
    model = net(scheme).eval()
    for i, name in enumerate("ab"):
        weft.attach(model, weft.LoRA(rank=2), ["first", "second"], name=name)
        fill(model, name, seed=i)
    x = torch.randn(3, 7, 64)
    alone = []
    with torch.no_grad():
        for row, name in enumerate(("b", None, "a")):
            weft.use(model, name)
            alone.append(model(x[row : row + 1]))
        weft.use(model, ["b", None, "a"])
        torch.testing.assert_close(model(x), torch.cat(alone), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_base(scheme: str, dtype: torch.dtype) -> None:
    model = net(scheme, dtype)
    before = bits(model)
    plan = weft.attach(model, weft.LoRA(rank=2), ["first", "second"])
    assert {s.site.dtype for s in plan.sites} == {torch.float32}
    fill(model)
    x = torch.randn(2, 5, 64, dtype=dtype)
    with torch.no_grad():
        live = model(x)
        assert live.dtype == dtype
        weft.merge(model, "default")
        assert (model(x) - live).norm() / live.norm() < 3 * ERROR[scheme]
        weft.unmerge(model)
        assert torch.equal(model(x), live)
    assert same(bits(model), before)


def test_merge_before_any_forward_and_copy_after_it(scheme: str) -> None:
    model = net(scheme)
    before = bits(model)
    weft.attach(model, weft.LoRA(rank=2), ["first", "second"])
    fill(model)
    weft.merge(model, "default")
    x = torch.randn(2, 64)
    merged = model(x)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), merged)
    weft.unmerge(other)
    assert torch.equal(model(x), merged)
    weft.unmerge(model)
    assert same(bits(model), before)
    assert same(bits(other), before)


def test_merge_for_good(scheme: str) -> None:
    model = net(scheme)
    weft.attach(model, weft.LoRA(rank=2), ["first", "second"])
    fill(model)
    x = torch.randn(2, 64)
    live = model(x).detach()
    weft.merge(model, "default", keep=False)
    assert "weave" not in model.__dict__
    assert (model(x) - live).norm() / live.norm() < 3 * ERROR[scheme]


def test_whole_model_except_its_head(scheme: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(12).view(2, 6)
    full = model(ids).logits
    quantise(model, scheme)
    assert type(model.lm_head) is nn.Linear
    assert type(model.lm_head.weight) is nn.Parameter
    plan = weft.attach(model, weft.LoRA(rank=2))
    assert len(plan.sites) == 7
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert 0 < (model(ids).logits - full).abs().max() < (1.5 if scheme == "packed-int2" else 0.5)
    with pytest.raises(ValueError, match="quantise the base first"):
        quantise_model(model, scheme)


class Packed(nn.Module):
    """A layer of a library that Weft has never heard of."""

    def __init__(self, transposed: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.transposed = 8, 6, transposed
        self.register_buffer("codes", torch.randint(-8, 8, (6, 8), dtype=torch.int8))

    def dequantize(self) -> Tensor:
        w = self.codes.float() / 8
        return w.T if self.transposed else w

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes.float() / 8).T


@pytest.mark.parametrize("transposed", [False, True])
def test_any_module_with_dequantize(transposed: bool) -> None:
    model = nn.Sequential(Packed(transposed), nn.Linear(6, 4))
    x = torch.randn(3, 8)
    base = model(x)
    weft.attach(model, weft.DoRA(rank=2), "all-linear")
    torch.testing.assert_close(model(x), base, atol=1e-6, rtol=1e-5)
    codes, dense = model[0].codes.clone(), model[1].weight.clone()
    fill(model)
    assert (model(x) - base).abs().max() > 1e-3
    with pytest.raises(AdapterError, match=r"0: .*not quantised again"):
        weft.merge(model, "default")
    assert torch.equal(model[0].codes, codes)
    assert torch.equal(model[1].weight, dense)


def test_what_cannot_be_quantised() -> None:
    with pytest.raises(ValueError, match="did you mean 'nf4'"):
        quantise_model(Net(), "nf5")
    with pytest.raises(ValueError, match="no linear layer"):
        quantise_model(nn.Sequential(nn.Conv1d(4, 4, 1)), "int8")


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if not s.startswith("packed")])
def test_missing_package_names_the_command(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("bitsandbytes", "torchao", "torchao.quantization", "torchao.prototype.quantization.int4"):
        monkeypatch.setitem(sys.modules, package, None)
    model: Any = Net()
    with pytest.raises(MissingExtra, match=r"pip install 'weft\[quant\]'"):
        quantise_model(model, scheme)
    assert type(model.first) is nn.Linear


def test_raw_read_layers_stay() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(ValueError, match="no linear layer"):
        quantise_model(layer, "nf4")


def test_attaching_imports_no_quantisation_library() -> None:
    code = (
        "import sys, torch, weft\n"
        "m = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "weft.attach(m, weft.LoRA(rank=2)); m(torch.ones(1, 4)); weft.merge(m, 'default')\n"
        "assert not {'bitsandbytes', 'torchao'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
