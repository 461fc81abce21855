"""Modules that read a neighbour's weight, run twice, or wear a wrapper: adapted truly, or refused by name."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import weft
from weft.kinds import probe
from weft.kinds.root import NeverCalled


def fill(model: nn.Module, name: str | None = None, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in weft.parameters(model, name):
            p += 0.3 * torch.randn(p.shape, generator=generator)


def randomise(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.eval()


def merged_equals_live(model: nn.Module, *inputs: Tensor) -> None:
    """The adapter changes the output, and folding it gives the same output."""
    with torch.no_grad():
        live = model(*inputs)
        with weft.using(model, None):
            base = model(*inputs)
        assert (live - base).abs().max() > 1e-2
        weft.merge(model, "default")
        torch.testing.assert_close(model(*inputs), live, atol=1e-5, rtol=1e-4)
        weft.unmerge(model)
        weft.use(model, None)
        assert torch.equal(model(*inputs), base)


class Attend(nn.Module):
    """Self-attention with everything that nn.MultiheadAttention can be given."""

    def __init__(self, batch_first: bool = True):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        if not self.batch_first:
            x = x.transpose(0, 1)
        y, weights = self.attention(x, x, x, **masks)
        assert weights.shape[0] == x.shape[0 if self.batch_first else 1]
        return y if self.batch_first else y.transpose(0, 1)


@pytest.mark.parametrize("targets", [["in_proj_weight", "out_proj"], ["in_proj_weight"], ["out_proj"]])
def test_multihead_attention(targets: list[str]) -> None:
    model = randomise(Attend())
    x = torch.randn(2, 5, 8)
    base = model(x)
    weft.attach(model, weft.LoRA(rank=2), targets)
    torch.testing.assert_close(model(x), base, atol=1e-6, rtol=1e-5)
    fill(model)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in weft.parameters(model))
    merged_equals_live(model, x)
    assert type(copy.deepcopy(model).attention).__name__ == "MultiheadAttention"


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "shared", "each", "padding"])
def test_multihead_attention_by_rows(batch_first: bool, mask: str) -> None:
    model = randomise(Attend(batch_first))
    rows = 4
    x = torch.randn(rows, rows, 8)  # as many tokens as rows: the place of the batch cannot be guessed from sizes
    masks: dict[str, Any] = {
        "none": {},
        "shared": {"attn_mask": torch.randn(rows, rows)},
        "each": {"attn_mask": torch.randn(rows * 2, rows, rows)},
        "padding": {"key_padding_mask": torch.tensor([[False] * 3 + [True]] * 2 + [[False] * 4] * 2)},
    }[mask]
    for i, name in enumerate("ab"):
        weft.attach(model, weft.LoRA(rank=2), ["in_proj_weight", "out_proj"], name=name)
        fill(model, name, seed=i)
    together = {}
    for name in ("a", None, "b"):
        weft.use(model, name)
        together[name] = model(x, **masks)
    weft.use(model, ["b", None, "a", "b"])
    expected = torch.stack([together[n][i] for i, n in enumerate(("b", None, "a", "b"))])
    torch.testing.assert_close(model(x, **masks), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ["linear1", "linear2"], ["norm1"]])
def test_fused_path_of_transformer_encoder(targets: Any) -> None:
    model = randomise(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2))
    x = torch.randn(2, 5, 8)
    weft.attach(model, weft.Full() if targets == ["norm1"] else weft.LoRA(rank=2), targets)
    fill(model)
    slow = model(x)
    with torch.no_grad():
        assert torch.backends.mha.get_fastpath_enabled()
        torch.testing.assert_close(model(x), slow, atol=1e-5, rtol=1e-4)
    merged_equals_live(model, x)


def test_fused_path_around_a_block_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1))
    x = torch.randn(2, 5, 8)
    weft.attach(model, weft.Bottleneck(), "self_attn")
    with torch.no_grad(), pytest.raises(NeverCalled, match=r"layers\.0\.self_attn.*set_fastpath_enabled"):
        model(x)
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    with torch.no_grad():
        model(x)


class Mamba(nn.Module):
    """Projections whose weights a fused scan reads raw, as Mamba's kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(8, 8)
        self.conv1d = nn.Conv1d(8, 8, 3, padding=2, groups=8)
        self.out_proj = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.in_proj(x).transpose(1, 2)
        h = F.conv1d(h, self.conv1d.weight, self.conv1d.bias, padding=2, groups=8)[..., : x.shape[1]]
        return F.linear(F.silu(h.transpose(1, 2)), self.out_proj.weight)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", ["out_proj", "conv1d"])
def test_raw_reader_is_named(name: str, mode: Any) -> None:
    model = nn.Sequential(Mamba(), nn.Linear(8, 8))
    weft.attach(model, weft.LoRA(rank=8 if name == "conv1d" else 2), ["in_proj", name])
    for _ in range(2):  # and again: an error that was caught has not settled it
        with mode(), pytest.raises(NeverCalled, match=rf"0\.{name}: .*through='weight'"):
            model(torch.randn(2, 5, 8))
    weft.detach(model)
    assert not any(p.grad is not None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["out_proj", "conv1d"])
def test_raw_reader_through_the_weight(name: str) -> None:
    model = nn.Sequential(randomise(Mamba()), nn.Linear(8, 8)).eval()
    weft.attach(model, weft.LoRA(rank=8 if name == "conv1d" else 2), ["in_proj", name], through="weight")
    fill(model)
    merged_equals_live(model, torch.randn(2, 5, 8))


class Fused(nn.Module):
    """A bare matrix, read more than once in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(24, 8))
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        q, k = F.linear(x, self.qkv[:8]), F.linear(x, self.qkv[8:16])
        return q * k + F.linear(x, self.qkv[16:])


def test_bare_parameter_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Fused())
    weft.attach(model, weft.LoRA(rank=2), "qkv")
    fill(model)
    seat, computed = model.weave.seats["1.qkv"], []
    value = seat.value
    monkeypatch.setattr(seat, "value", lambda route: computed.append(route) or value(route))
    model(torch.randn(3, 8))
    assert len(computed) == 1
    merged_equals_live(model, torch.randn(3, 8))
    assert [n for n, _ in model.named_parameters() if "adapters" in n] == [
        "1.adapters.default.qkv.A", "1.adapters.default.qkv.B",
    ]  # fmt: skip


def test_lstm() -> None:
    class Last(nn.LSTM):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)[0]

    model = randomise(nn.Sequential(Last(8, 8)))
    weft.attach(model, weft.LoRA(rank=2), ["weight_ih_l0", "weight_hh_l0"])
    fill(model)
    merged_equals_live(model, torch.randn(3, 2, 8))


class Keeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 8))
        self.kept = [self.matrix]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kept[0])


def test_module_that_keeps_its_own_reference() -> None:
    model = nn.Sequential(Keeper())
    weft.attach(model, weft.LoRA(rank=2), "matrix")
    with pytest.raises(NeverCalled, match=r"0\.matrix.*reference of its own"):
        model(torch.randn(3, 8))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.same = self.one  # one module at two paths
        self.other = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.same(torch.tanh(self.one(x))))


def test_module_used_twice_and_at_two_paths() -> None:
    model = randomise(Twice())
    x = torch.randn(3, 8)
    plan = weft.attach(model, weft.LoRA(rank=2), "all-linear")
    assert [s.site.address for s in plan.sites] == ["one", "other"]
    fill(model)
    merged_equals_live(model, x)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False) if n.endswith(".A")]
    assert names == ["one.adapters.default.A", "same.adapters.default.A", "other.adapters.default.A"]


class Optional(nn.Module):
    """A branch that some inputs do not need, randomness, and statistics that count the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.always = nn.Linear(8, 8)
        self.sometimes = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x: Tensor, extra: bool = False, past_key_values: Any = None) -> dict[str, Tensor]:
        self.calls += 1
        y = self.drop(self.always(self.norm(x)))
        return {"y": self.sometimes(y) if extra else y}


def test_unneeded_module_is_no_false_alarm_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model, x = Optional().train(), torch.randn(4, 8)
    twin = copy.deepcopy(model)
    weft.attach(model, weft.LoRA(rank=2), "all-linear")
    torch.manual_seed(1)
    first = model(x)["y"], torch.rand(1), model.norm.running_mean.clone(), model.norm.num_batches_tracked.clone()
    assert model.calls == 2
    torch.manual_seed(1)
    expected = twin(x)["y"], torch.rand(1), twin.norm.running_mean, twin.norm.num_batches_tracked
    assert all(torch.equal(a, b) for a, b in zip(first, expected, strict=True))
    model(x)
    assert model.calls == 3
    fill(model)
    model.eval()
    adapted = model(x, extra=True)["y"]
    with weft.using(model, None):
        assert not torch.equal(adapted, model(x, extra=True)["y"])


def test_probe_waits_for_a_forward_that_can_be_repeated() -> None:
    class Cache:
        length = 3

        def get_seq_length(self) -> int:
            return self.length

    class Cached(Mamba):
        def forward(self, x: Tensor, past_key_values: Any = None) -> Tensor:
            return super().forward(x)

    model = Cached()
    weft.attach(model, weft.LoRA(rank=2), "out_proj")
    filled, empty = Cache(), Cache()
    empty.length = 0
    model(torch.randn(2, 5, 8), past_key_values=filled)
    with pytest.raises(NeverCalled, match="out_proj"):
        model(torch.randn(2, 5, 8), past_key_values=empty)


def test_probe_does_not_run_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "check_used", lambda *_: pytest.fail("the probe ran"))
    model = Optional().eval()
    weft.attach(model, weft.LoRA(rank=2), "all-linear")
    x = torch.randn(4, 8)
    expected = model.base_class.forward(model, x)["y"]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)["y"], expected)


def test_other_route_is_not_probed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Mamba())
    weft.attach(model, weft.LoRA(rank=2), "out_proj", name="trap")
    weft.attach(model, weft.LoRA(rank=2), "0", name="fine")
    x = torch.randn(2, 5, 8)
    model(x)
    weft.use(model, None)
    model(x)
    weft.use(model, "trap")
    with pytest.raises(NeverCalled):
        model(x)


def test_two_ways_of_reading_one_module() -> None:
    model = nn.Sequential(Attend())
    with pytest.raises(ValueError, match="no weight can express it"):
        weft.attach(model, weft.Bottleneck(), ["0.attention.in_proj_weight", "0.attention"])
    weft.attach(model, weft.LoRA(rank=2), "in_proj_weight", name="inside")
    with pytest.raises(ValueError, match="both ways"):
        weft.attach(model, weft.Bottleneck(), "0.attention", name="whole")


def test_wrapper_on_the_instance_still_runs() -> None:
    accelerate = pytest.importorskip("accelerate")

    class Count(accelerate.hooks.ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            Count.calls += 1
            return args, kwargs

    model = randomise(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    x = torch.randn(3, 8)
    base = model(x)
    accelerate.hooks.add_hook_to_module(model[0], Count())
    weft.attach(model, weft.LoRA(rank=2), "0")
    fill(model)
    assert not torch.equal(model(x), base)
    assert Count.calls == 1
    weft.detach(model)
    assert torch.equal(model(x), base)
    assert Count.calls == 2


def test_hook_on_the_model_itself_keeps_the_checks() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Mamba()
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
    weft.attach(model, weft.LoRA(rank=2), "out_proj")
    with pytest.raises(NeverCalled):
        model(torch.randn(2, 5, 8))
    weft.detach(model)
    assert "forward" in model.__dict__


def test_class_of_an_adapted_model_makes_plain_models() -> None:
    model = Twice()
    weft.attach(model, weft.LoRA(rank=2), "all-linear")
    other = type(model)()
    assert type(other) is Twice
    assert other.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})


def test_pickle_of_a_model_with_traps() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    weft.attach(model, weft.LoRA(rank=2), ["in_proj_weight", "out_proj", "1"])
    other = pickle.loads(pickle.dumps(model))
    assert [n for n, _ in other.named_parameters()] == [n for n, _ in model.named_parameters()]
