"""Linear layers whose weight is packed in one of the known public layouts: GPTQ, AWQ and HQQ, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AWQLinear", "GPTQLinear", "HQQLinear", "PackedLinear", "pack_bits", "round_to_grid", "unpack_bits"]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns AWQ's kernels expect in the i-th four bits of a word."""


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [n, m] as a stream of bits along the first dimension: int32 [ceil(n bits / 32), m]."""
    at = torch.arange(len(codes), device=codes.device) * bits
    words = codes.new_zeros(-(-len(codes) * bits // 32), codes.shape[1], dtype=torch.int64)
    value = codes.long() << (at % 32)[:, None]
    words.index_add_(0, at // 32, value & 0xFFFFFFFF)  # the bits of two codes never meet, so a sum is an `or`
    crosses = (at % 32 + bits > 32).nonzero().flatten()  # three bits: the 11th and the 22nd code of 32
    words.index_add_(0, at[crosses] // 32 + 1, value[crosses] >> 32)
    return words.to(torch.int32)  # wraps: the same 32 bits


def unpack_bits(words: Tensor, bits: int, size: int) -> Tensor:
    """The inverse of `pack_bits`: int32 codes [size, m]."""
    at = torch.arange(size, device=words.device, dtype=torch.int32) * bits  # a shift by int64 would make codes of it
    shift, mask = at % 32, (1 << bits) - 1
    codes = words.index_select(0, at // 32) >> shift[:, None]  # arithmetic: the sign fills the top
    crosses = (shift + bits > 32).nonzero().flatten()
    if len(crosses):
        have = (32 - shift[crosses])[:, None]
        low = codes[crosses] & ((1 << have) - 1).to(torch.int32)
        codes[crosses] = low | (words.index_select(0, at[crosses] // 32 + 1) << have.to(torch.int32))
    return codes.bitwise_and_(mask)


def round_to_grid(
    weight: Tensor, bits: int, group_size: int, low: Tensor | float = 1.0, high: Tensor | float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Round [O, I] to a grid of 2^bits steps per group of inputs: codes [O, I], zeros and scales [O, G].

    low, high: factors on a group's smallest and largest weight, which are then clipped (numbers, or [O, G]).
    """
    groups = F.pad(weight.float(), (0, -weight.shape[1] % group_size), mode="replicate").unflatten(1, (-1, group_size))
    most = (1 << bits) - 1
    least, largest = low * groups.amin(-1).clamp(max=0), high * groups.amax(-1).clamp(min=0)  # [O, G]
    scales = ((largest - least) / most).clamp(min=6e-8).half().float()  # as the layout stores it; no smaller half
    zeros = (-least / scales).round().clamp(0, most)
    codes = (groups / scales[..., None]).round() + zeros[..., None]
    return codes.clamp(0, most).flatten(1)[:, : weight.shape[1]].int(), zeros.int(), scales


class PackedLinear(nn.Module):
    """y = W x + b with W [O, I] unpacked for each use; `dequantize` is all that a subclass has to say."""

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def dequantize(self) -> Tensor:
        """The weight, [O, I]."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.dequantize().to(input.dtype), self.bias)

    def _hold(self, shapes: dict[str, tuple[Sequence[int], torch.dtype]]) -> None:
        """Parameters, as a 4-bit layer of bitsandbytes has them: they move, and are saved, with the weights."""
        for name, (shape, dtype) in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False))


class GPTQLinear(PackedLinear):
    """GPTQ's layout: codes of 2, 3, 4 or 8 bits along the inputs, one scale and zero point per group and output.

    offset: 1 where the file stores zero points less one (its first format), 0 where it stores them (`gptq_v2`).
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def __init__(
        self, in_features: int, out_features: int, bits: int, group_size: int, *, bias: Tensor | None = None,
        offset: int = 0,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias)
        self.bits, self.offset = bits, offset
        self.group_size = in_features if group_size == -1 else group_size
        groups = -(-in_features // self.group_size)
        self._hold(
            {
                "qweight": ((-(-in_features * bits // 32), out_features), torch.int32),
                "qzeros": ((groups, -(-out_features * bits // 32)), torch.int32),
                "scales": ((groups, out_features), torch.float16),
                "g_idx": ((in_features,), torch.int32),
            }
        )

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, bits: int, group_size: int) -> GPTQLinear:
        """A weight [O, I], rounded to the nearest."""
        made = cls(weight.shape[1], weight.shape[0], bits, group_size, bias=bias).to(weight.device)
        made.write(*round_to_grid(weight, bits, made.group_size))
        return made

    @torch.no_grad()
    def write(self, codes: Tensor, zeros: Tensor, scales: Tensor) -> None:
        """Put codes [O, I], zeros and scales [O, G] in place; the groups then are neighbouring inputs."""
        self.qweight.copy_(pack_bits(codes.T, self.bits))
        stored = (zeros - self.offset) & ((1 << self.bits) - 1)
        self.qzeros.copy_(pack_bits(stored, self.bits).T)
        self.scales.copy_(scales.T)
        self.g_idx.copy_(torch.arange(self.in_features, device=codes.device) // self.group_size)

    def dequantize(self) -> Tensor:
        codes = unpack_bits(self.qweight, self.bits, self.in_features)  # [I, O]
        zeros = unpack_bits(self.qzeros.T.contiguous(), self.bits, self.out_features).T  # [G, O]
        zeros = (zeros + self.offset) & ((1 << self.bits) - 1)
        group = self.g_idx.long()
        weight = codes.sub_(zeros[group]).float()
        del codes  # of the weight's size, as each of these is: two at a time are enough
        return weight.mul_(self.scales.float()[group]).T.contiguous()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"


class AWQLinear(PackedLinear):
    """AWQ's layout (`gemm`): eight codes of four bits along the outputs in a word, in the order of its kernels."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor

    def __init__(self, in_features: int, out_features: int, group_size: int, *, bias: Tensor | None = None):
        super().__init__(in_features, out_features, bias)
        self.group_size = in_features if group_size == -1 else group_size
        groups = -(-in_features // self.group_size)
        self._hold(
            {
                "qweight": ((in_features, out_features // 8), torch.int32),
                "qzeros": ((groups, out_features // 8), torch.int32),
                "scales": ((groups, out_features), torch.float16),
            }
        )

    def dequantize(self) -> Tensor:
        codes, zeros = _awq_codes(self.qweight), _awq_codes(self.qzeros)  # [I, O], [G, O]
        group = torch.arange(self.in_features, device=codes.device) // self.group_size
        return ((codes - zeros[group]) * self.scales.float()[group]).T.contiguous()


def _awq_codes(words: Tensor) -> Tensor:
    """[n, O / 8] words as [n, O] codes."""
    at = torch.tensor(AWQ_ORDER, device=words.device).argsort().int()  # column -> its place in the word
    return ((words[..., None] >> (4 * at)) & 15).flatten(1).int()


class HQQLinear(PackedLinear):
    """HQQ's layout: the codes of the weight seen as groups, several rows of groups in one word; float zero points."""

    W_q: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(
        self, in_features: int, out_features: int, bits: int, group_size: int | None, axis: int, *,
        bias: Tensor | None = None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias)
        self.bits, self.axis = bits, axis
        self.group_size = group_size or (in_features if axis == 1 else out_features)
        count = in_features * out_features // self.group_size
        self.rows = count if axis == 1 else self.group_size
        per_word = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits]
        columns = in_features * out_features // self.rows
        kind = torch.int32 if bits == 3 else torch.uint8
        grid = (count, 1) if axis == 1 else (1, count)
        self._hold(
            {
                "W_q": ((-(-self.rows // per_word), columns), kind),
                "scale": (grid, torch.float16),
                "zero": (grid, torch.float16),
            }
        )

    def dequantize(self) -> Tensor:
        words = self.W_q.int() if self.bits < 8 else self.W_q
        places = 10 if self.bits == 3 else 8 // self.bits  # the first rows are in the highest bits
        parts = [(words >> (self.bits * (places - 1 - i))) & ((1 << self.bits) - 1) for i in range(places)]
        codes = torch.cat(parts)[: self.rows].float()
        weight = (codes - self.zero.float()) * self.scale.float()
        return weight.view(self.out_features, self.in_features)
