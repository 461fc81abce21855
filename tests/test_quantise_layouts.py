"""Packed layouts against the definition of each format, and what a step through them keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.attach import AdapterError
from weft.kinds.packed import AWQLinear, GPTQLinear, HQQLinear, PackedLinear, pack_bits, unpack_bits
from weft.quantise import GROUPED, SCHEMES, quantise_model

OUT, IN, GROUP = 40, 96, 32


def whole_words(codes: list[int], bits: int) -> list[int]:
    """Codes as 32-bit words, by writing them as text: the first code in the lowest bits."""
    stream = "".join(reversed([format(code, f"0{bits}b") for code in codes]))
    stream = stream.zfill(-(-len(stream) // 32) * 32)
    words = [int(stream[i : i + 32], 2) for i in range(0, len(stream), 32)][::-1]
    return [w - (1 << 32) if w >> 31 else w for w in words]


def draw(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [32, 77])
def test_bits_are_a_stream_along_the_inputs(bits: int, count: int) -> None:
    codes = draw(0, 1 << bits, count, 3)
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32
    assert words.T.tolist() == [whole_words(column, bits) for column in codes.T.tolist()]
    assert torch.equal(unpack_bits(words, bits, count), codes.int())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("offset", [0, 1])
def test_gptq(bits: int, offset: int) -> None:
    """w = scale (code - zero), groups by g_idx in any order, zero points stored less one in the first format."""
    layer = GPTQLinear(IN, OUT, bits, GROUP, offset=offset)
    codes, zeros = draw(0, 1 << bits, IN, OUT), draw(1, 1 << bits, IN // GROUP, OUT)
    scales, order = torch.rand(IN // GROUP, OUT).half(), draw(0, IN // GROUP, IN)
    layer.qweight.data = torch.tensor([whole_words(c, bits) for c in codes.T.tolist()]).T.int()
    layer.qzeros.data = torch.tensor([whole_words(z, bits) for z in (zeros - offset).tolist()]).int()
    layer.scales.data, layer.g_idx.data = scales, order.int()
    expected = torch.stack([scales[g].float() * (codes[i] - zeros[g]) for i, g in enumerate(order.tolist())])
    assert torch.equal(layer.dequantize(), expected.T)


def test_awq() -> None:
    """Bits 4 i of a word hold column order[i] of eight."""
    layer = AWQLinear(IN, OUT, GROUP)
    codes, zeros = draw(0, 16, IN, OUT), draw(0, 16, IN // GROUP, OUT)
    scales = torch.rand(IN // GROUP, OUT).half()

    def words(rows: Tensor) -> Tensor:
        found = []
        for row in rows.tolist():
            eights = [[row[c + o] for o in (0, 2, 4, 6, 1, 3, 5, 7)] for c in range(0, OUT, 8)]
            found.append([whole_words(eight, 4)[0] for eight in eights])
        return torch.tensor(found).int()

    layer.qweight.data, layer.qzeros.data, layer.scales.data = words(codes), words(zeros), scales
    expected = torch.stack([scales[i // GROUP].float() * (codes[i] - zeros[i // GROUP]) for i in range(IN)])
    assert torch.equal(layer.dequantize(), expected.T)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_hqq(bits: int, axis: int) -> None:
    """w = scale (code - zero) on the weight seen as groups; a word holds rows a fixed step apart, high bits first."""
    layer = HQQLinear(IN, OUT, bits, GROUP, axis)
    rows, columns = (OUT * IN // GROUP, GROUP) if axis == 1 else (GROUP, OUT * IN // GROUP)
    codes = draw(0, 1 << bits, rows, columns)
    places = 10 if bits == 3 else 8 // bits
    step = -(-rows // places)
    padded = torch.cat([codes, torch.zeros(step * places - rows, columns, dtype=codes.dtype)])
    words = sum(padded[i * step : (i + 1) * step] << (bits * (places - 1 - i)) for i in range(places))
    layer.W_q.data = words.to(layer.W_q.dtype)
    grid = (rows, 1) if axis == 1 else (1, columns)
    layer.scale.data, layer.zero.data = torch.rand(grid).half(), (torch.rand(grid) * 3).half()
    expected = ((codes - layer.zero.float()) * layer.scale.float()).reshape(OUT, IN)
    assert torch.equal(layer.dequantize(), expected)


def gptq() -> PackedLinear:
    layer = GPTQLinear.of(torch.randn(OUT, IN), torch.randn(OUT), 3, GROUP)
    layer.g_idx.data = layer.g_idx.data.flip(0)
    return layer


def awq() -> PackedLinear:
    layer = AWQLinear(IN, OUT, GROUP)
    layer.qweight.data = draw(-(2**31), 2**31, *layer.qweight.shape).int()
    layer.qzeros.data = draw(-(2**31), 2**31, *layer.qzeros.shape).int()
    layer.scales.data.fill_(0.01)
    return layer


def hqq() -> PackedLinear:
    layer = HQQLinear(IN, OUT, 4, GROUP, 1)
    layer.W_q.data = draw(0, 256, *layer.W_q.shape).to(torch.uint8)
    layer.scale.data.fill_(0.01)
    layer.zero.data.fill_(7.5)
    return layer


@pytest.mark.parametrize("make", [gptq, awq, hqq])
def test_adapters_train_on_every_layout(make: Callable[[], PackedLinear]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Tanh())
    x = torch.randn(5, IN, requires_grad=True)
    base = model(x)
    dense = model[0].dequantize()
    (expected,) = torch.autograd.grad(
        (x @ dense.T + (model[0].bias if model[0].bias is not None else 0)).tanh().sum(), x
    )
    weft.attach(model, weft.LoRA(rank=2), ["0"])
    assert torch.equal(model(x), base)
    (got,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(AdapterError, match=r"desc_act|not quantised again"):
        weft.merge(model, "default")


def kept_by_a_step(scheme: str, size: int) -> int:
    """Bytes that a step of one quantised layer keeps for its backward beside what the adapter's own factors need."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size))
    quantise_model(model, scheme, group_size=32 if scheme in GROUPED else None)
    weft.attach(model, weft.BiasTuning(), ["0"])
    own = {p.data_ptr() for p in model.parameters()}
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept.append(t.numel() * t.element_size())
        return t

    weft.attach(model, weft.BiasTuning(), ["1"], name="second")
    weft.use(model, {"default": 1.0, "second": 1.0})
    x = torch.randn(2, size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    y.sum().backward()
    assert x.grad is not None
    return sum(kept)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_a_step_keeps_does_not_grow_with_the_weight(scheme: str) -> None:
    small, large = kept_by_a_step(scheme, 64), kept_by_a_step(scheme, 256)
    assert large <= 4 * small + 4096
    assert large < 256 * 256  # not even one byte per weight


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gradient_is_that_of_the_library(scheme: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96))
    quantise_model(model, scheme, group_size=32 if scheme in GROUPED else None)
    x, dy = torch.randn(3, 64, requires_grad=True), torch.randn(3, 96)
    if scheme == "torchao-int4":  # its kernel has none: it learns to train here
        with pytest.raises(RuntimeError, match="derivative"):
            model(x).backward(dy)
        theirs = dy @ nn.functional.linear(torch.eye(64), model[0].weight).T
    else:
        (theirs,) = torch.autograd.grad(model(x), x, dy)
    weft.attach(model, weft.LoRA(rank=2), ["0"])
    (ours,) = torch.autograd.grad(model(x), x, dy)
    if scheme in ("nf4", "fp4"):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
