"""Tiny models for the common tests: every kind of site, and what each computes with its site written as a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

from weft.checks import PLACES, Place, Single, floats

Apply = Callable[..., Tensor]
"""apply(address, x, expert=None): the dense map at a site. x [N, I, *kernel] -> [N, O]."""


@dataclass(frozen=True)
class Cell(Place):
    """A tiny model, and `dense(model, apply, *inputs)`: what it computes, given what its sites do."""

    dense: Callable[..., Tensor] = lambda model, apply, x: rows(apply, "site", x)


def rows(apply: Apply, address: str, x: Tensor) -> Tensor:
    """A map of the last dimension."""
    return apply(address, x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def chain(model: nn.Module, apply: Apply, x: Tensor) -> Tensor:
    return rows(apply, "other", rows(apply, "site", x))


def convolved(model: nn.Module, apply: Apply, x: Tensor) -> Tensor:
    """A convolution as a map of patches: pad, cut, apply, put back in place."""
    conv = model.site
    pads = [p for size in reversed(conv.padding) for p in (size, size)]
    x = F.pad(x, pads)
    counts = [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], conv.kernel_size, conv.stride, strict=True)]
    patches = []
    for at in product(*map(range, counts)):
        cut = [slice(i * s, i * s + k) for i, s, k in zip(at, conv.stride, conv.kernel_size, strict=True)]
        patches.append(x[(slice(None), slice(None), *cut)])
    y = torch.stack([apply("site", p) for p in patches], -1)
    return y.unflatten(-1, counts)


def looked_up(model: nn.Module, apply: Apply, ids: Tensor) -> Tensor:
    """An embedding as a map of one-hot rows."""
    return rows(apply, "site", F.one_hot(ids, model.site.num_embeddings).to(model.site._parameters["weight"].dtype))


def layer_norm(model: nn.Module, apply: Apply, x: Tensor) -> Tensor:
    return rows(apply, "site", F.layer_norm(x, x.shape[-1:], eps=model.site.eps))


def rms_norm(model: nn.Module, apply: Apply, x: Tensor) -> Tensor:
    y = x.float()  # as transformers computes it
    return rows(
        apply, "site", (y * (y.square().mean(-1, keepdim=True) + model.site.variance_epsilon).rsqrt()).to(x.dtype)
    )


def picked(model: nn.Module, apply: Apply, x: Tensor, expert: Tensor) -> Tensor:
    return torch.cat([apply("site.up_proj", row[None], e) for row, e in zip(x, expert.tolist(), strict=True)])


def mixtral(model: nn.Module, apply: Apply, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for n, k in product(range(len(x)), range(index.shape[1])):
        e = int(index[n, k])
        gate, up = apply("site.gate_up_proj", x[n : n + 1], e).chunk(2, -1)
        y[n] += weight[n, k] * apply("site.down_proj", F.silu(gate) * up, e)[0]
    return y


class Attention(nn.Module):
    """An attention-like block: it returns a tuple, as transformers' attentions do."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.o_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(self.q_proj(hidden_states) @ hidden_states.mT, -1)
        return self.o_proj(weights @ self.v_proj(hidden_states)), weights


class First(nn.Module):
    """A model around a block that is called by keyword and returns a tuple."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        return self.site(hidden_states=x, mask=None)[0]


def block(model: nn.Module, apply: Apply, x: Tensor) -> Tensor:
    return apply("site", x)


def _gpt2() -> nn.Module:
    module = Conv1D(12, 8)
    nn.init.normal_(module.bias)
    return Single(module)


def _rms() -> nn.Module:
    module = LlamaRMSNorm(8)
    nn.init.normal_(module.weight, 1.0, 0.3)
    return Single(module)


def _mixtral() -> nn.Module:
    config = MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=3, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    module = MixtralExperts(config)
    for p in module.parameters():
        nn.init.normal_(p, 0.0, 0.3)
    return Single(module)


def _routed(n: int) -> tuple[Tensor, ...]:
    first = torch.arange(n) % 3
    return torch.randn(n, 8), torch.stack([first, (first + 1) % 3], 1), torch.rand(n, 2) + 0.2


_DENSE = {
    "linear": chain, "linear with bias": Cell.dense, "conv": convolved, "embedding": looked_up, "norm": layer_norm,
    "block": block, "experts": picked,
}  # fmt: skip

CELLS = (
    *(Cell(p.name, p.kind, p.build, p.inputs, p.targets, _DENSE[p.name]) for p in PLACES),
    Cell("gpt2 conv1d", "linear", _gpt2, floats(3, 8)),
    Cell("conv1d", "conv", lambda: Single(nn.Conv1d(8, 12, 3, padding=1)), floats(8, 5), dense=convolved),
    Cell(
        "grouped conv",
        "conv",
        lambda: Single(nn.Conv2d(8, 12, 3, groups=2, bias=False)),
        floats(8, 4, 4),
        dense=convolved,
    ),
    Cell("conv3d", "conv", lambda: Single(nn.Conv3d(4, 8, 2)), floats(4, 3, 3, 3), dense=convolved),
    Cell("pointwise conv", "conv", lambda: Single(nn.Conv2d(8, 12, 1)), floats(8, 2, 2), dense=convolved),
    Cell("rms norm", "norm", _rms, floats(3, 8), dense=rms_norm),
    Cell("attention", "block", lambda: First(Attention()), floats(3, 8), dense=block),
    Cell("mixtral", "experts", _mixtral, _routed, ("site.gate_up_proj", "site.down_proj"), dense=mixtral),
)
"""Every tiny model. The first of a kind is the one that expensive checks use."""
