"""Claim: 256 adapters of a 12-layer model are compressed together in a minute, as near as the paper's method comes."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from torch import Tensor

import weft
from benchmarks.common import Claim, llama
from weft.attach import records
from weft.compress import joint_basis
from weft.compressing import compress_together, num_bytes

COUNT, RANK, SHARED = 256, 16, 64
SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 1000}
SMALL = {"size": 96, "count": 32, "rank": 16}
TARGETS: dict[str, Any] = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear": "all-linear"}


def run() -> list[Claim]:
    """The whole set on its model, once for the attention maps and once for all maps; then small sets, densely."""
    claims = [_timed(what, targets) for what, targets in TARGETS.items()]
    ratios = sorted(_ours_over_theirs(seed) for seed in range(3))
    name = f"reconstruction error over the paper's alternation, {SMALL['count']} adapters"
    return [*claims, Claim(name, ratios[1], ratios[0], ratios[2], 1.001, "sum of squared shares of the norm")]


def _timed(what: str, targets: Any) -> Claim:
    """Seconds of `compress_together`, from adapters on a model to adapters on a model, over 60."""
    torch.manual_seed(0)
    model = llama(**SHAPE)
    names = [f"a{n}" for n in range(COUNT)]
    method = weft.methods()["lora"](rank=RANK, alpha=float(RANK))
    for name in names:
        weft.attach(model, method, targets, name=name)
        _fill(model, name)
    before = sum(num_bytes(model, name) for name in names)
    started = time.perf_counter()
    found = compress_together(model, names, [f"{n}-small" for n in names], rank=SHARED)
    seconds = time.perf_counter() - started
    after = sum(t.nbytes for t in found.bases.values()) + sum(
        t.nbytes for n in found.names for a in records(model)[n].adapters.values() for t in a.parameters()
    )
    detail = (
        f"{seconds:.1f} s, {len(found.losses[names[0]])} maps, {before / 1e6:,.0f} MB to {after / 1e6:,.0f} MB, lost "
        f"{found.mean:.1%} of the norm on average"
    )
    share = seconds / 60
    return Claim(f"{COUNT} adapters of rank {RANK}, {what}: seconds over 60", share, share, share, 1.0, detail)


@torch.no_grad()
def _fill(model: Any, name: str) -> None:
    """Trained ones stand in: directions that all adapters of a map have in common, and some of their own."""
    for address, adapter in records(model)[name].adapters.items():
        seed = sum(map(ord, address))
        adapter.B.copy_(_alike(adapter.site.out_features, seed))
        adapter.A.copy_(_alike(adapter.site.in_features, seed + 1).mT)


def _alike(size: int, seed: int) -> Tensor:
    """[size, RANK]: nine tenths of its energy in 64 directions of a map, the rest anywhere."""
    common = _common(size, seed) @ torch.randn(SHARED, RANK) / SHARED**0.5
    return (common + torch.randn(size, RANK) / 3) / size**0.5


@cache
def _common(size: int, seed: int) -> Tensor:
    return torch.randn(size, SHARED, generator=torch.Generator().manual_seed(seed))


def _ours_over_theirs(seed: int) -> float:
    """The sum over adapters of what is lost, squared: ours over that of the alternation to its end, on dense sums."""
    torch.manual_seed(seed)
    size, count, rank = SMALL["size"], SMALL["count"], SMALL["rank"]
    pairs = [(_alike(size, seed), _alike(size, seed + 1).mT) for _ in range(count)]
    changes = torch.stack([(b @ a).double() for b, a in pairs])
    changes /= changes.norm(dim=(1, 2), keepdim=True)
    v = torch.linalg.eigh((changes.mT @ changes).sum(0))[1][:, -rank:].mT
    for _ in range(100):
        u = torch.linalg.eigh((changes @ v.mT @ v @ changes.mT).sum(0))[1][:, -rank:]
        v = torch.linalg.eigh((changes.mT @ u @ u.mT @ changes).sum(0))[1][:, -rank:].mT
    held = float((u.mT @ changes @ v.mT).square().sum())
    return float(joint_basis(pairs, rank).losses.square().sum()) / (count - held)


if __name__ == "__main__":
    torch.set_num_threads(2)
    for found in run():
        print(f"{found.name}: {found.ratio:.3f} (at most {found.target:g}; {found.detail})", flush=True)
