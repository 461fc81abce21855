"""ApiQ's start: codes and low-rank factors found together, layer after layer, so that errors do not pile up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import WeftError
from weft.kinds.packed import GPTQLinear, round_to_grid
from weft.quantise import Originals
from weft.targets import Plan, PlannedSite

__all__ = ["Moments", "fit", "solve"]

STEPS, RATE, CLIP_RATE = 200, 1e-3, 5e-3
CLIP_START = 4.0
"""Where the logits of the clipping factors begin: 98 % of a group's range."""


class _Reached(Exception):
    """The layer that was waited for has its input."""


@dataclass
class Moments:
    """Second moments over tokens: of inputs X in full precision, of inputs X_q after quantised layers, and of both."""

    full: Tensor
    mixed: Tensor  # X_q^T X
    quantised: Tensor

    def loss(self, weight: Tensor, value: Tensor) -> Tensor:
        """|| X W^T - X_q V^T ||^2 per token."""
        parts = ((weight @ self.full) * weight, (value @ self.mixed) * weight, (value @ self.quantised) * value)
        whole, cross, own = (part.sum() for part in parts)
        return whole - 2 * cross + own


def solve(
    model: nn.Module, plan: Plan, originals: Originals, batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Find and write the codes of every site that starts by ApiQ; its factors A and B, by address.

    Layers that read one input are solved after one pass; each waits for those before it, so the calibration batches go
    through the first i layers for every layer i. Liao et al. 2024, arXiv 2402.05147 (its layer-wise form).
    """
    sites = {s.path: s for s in plan.sites if "solution" in s.method.needs() and originals.weight(s.path) is not None}
    if not batches:
        raise WeftError("start='apiq' calibrates on data, and there are no batches")
    found: dict[str, dict[str, Tensor]] = {}
    model.eval()
    handles: list[Any] = []
    try:
        for group in _groups(model, list(sites), batches[0]):
            seen = _moments(model, group[0], originals, batches)
            for path in group:
                found |= _solve_site(model, sites[path], originals, seen, handles)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _solve_site(
    model: nn.Module, planned: PlannedSite, originals: Originals, seen: Moments, handles: list[Any]
) -> dict[str, dict[str, Tensor]]:
    layer, method = model.get_submodule(planned.path), planned.method
    if not isinstance(layer, GPTQLinear):
        raise WeftError(
            f"{planned.path} is a {type(layer).__name__}: start='apiq' needs a base in packed-int2 to -int8"
        )
    weight = originals.weight(planned.path)
    assert weight is not None, "only quantised sites are solved"
    steps = STEPS * int(getattr(method, "start_rounds", 1))
    a, b, low, high = fit(
        weight, seen, layer.bits, layer.group_size, rank=method.rank, steps=steps,  # type: ignore[attr-defined]
        generator=planned.site.generator("apiq"),
    )  # fmt: skip
    layer.write(*round_to_grid(weight, layer.bits, layer.group_size, low, high))

    def repaired(_module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return y + F.linear(F.linear(args[0], a.to(y.dtype)), b.to(y.dtype))

    handles.append(layer.register_forward_hook(repaired))
    dtype = planned.site.dtype
    return {planned.site.address: {"solution.0": a.to(dtype), "solution.1": b.to(dtype)}}


def fit(
    weight: Tensor, seen: Moments, bits: int, group_size: int, *, rank: int, steps: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """A [R, I], B [O, R] and clipping factors [O, G] that minimise `seen.loss(W, Q + B A)`; the best seen is kept.

    It starts at plain rounding's neighbour (B = 0), so the result is never worse than that.
    """
    weight = weight.float()
    out_features, in_features = weight.shape
    grid = (out_features, -(-in_features // group_size))
    a = torch.empty(rank, in_features, device=weight.device)
    a = nn.Parameter(a.uniform_(-(in_features**-0.5), in_features**-0.5, generator=generator))
    b = nn.Parameter(torch.zeros(out_features, rank, device=weight.device))
    clips = [nn.Parameter(torch.full(grid, CLIP_START, device=weight.device)) for _ in range(2)]
    optimizer = torch.optim.AdamW(
        [{"params": [a, b], "lr": RATE}, {"params": clips, "lr": CLIP_RATE}], weight_decay=0.0
    )
    least = seen.loss(weight, _value(*round_to_grid(weight, bits, group_size), group_size)).item()
    best = (a.detach().clone(), b.detach().clone(), *[torch.ones(grid)] * 2)
    with torch.enable_grad():
        for _ in range(steps + 1):
            low, high = (torch.sigmoid(clip) for clip in clips)
            loss = seen.loss(weight, _on_grid(weight, bits, group_size, low, high) + b @ a)
            if loss.item() < least:
                least, best = loss.item(), (a, b, low, high)
                best = tuple(t.detach().clone() for t in best)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return tuple(t.detach().to(weight.device) for t in best)  # type: ignore[return-value]


def _value(codes: Tensor, zeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    spread = torch.arange(codes.shape[1], device=codes.device) // group_size
    return (codes - zeros[:, spread]) * scales[:, spread]


def _on_grid(weight: Tensor, bits: int, group_size: int, low: Tensor, high: Tensor) -> Tensor:
    """`round_to_grid` and back, whose gradient for the factors passes through the roundings as if there were none."""
    spread = torch.arange(weight.shape[1], device=weight.device) // group_size
    _, zeros, exact = round_to_grid(weight, bits, group_size, low.detach(), high.detach())
    padded = F.pad(weight, (0, -weight.shape[1] % group_size), mode="replicate").unflatten(1, (-1, group_size))
    most = (1 << bits) - 1
    least, largest = low * padded.amin(-1).clamp(max=0), high * padded.amax(-1).clamp(min=0)
    scales = (largest - least) / most
    scales = (scales + (exact - scales).detach())[:, spread]
    point = -least[:, spread] / scales
    point = point + (zeros[:, spread] - point).detach()
    ratio = weight / scales
    codes = (ratio + (ratio.round() - ratio).detach() + point).clamp(0, most)
    return (codes - point) * scales


@torch.no_grad()
def _groups(model: nn.Module, paths: Sequence[str], batch: Mapping[str, Tensor]) -> list[list[str]]:
    """The layers in the order in which they run, together where they read the same tensor."""
    order: list[tuple[str, Tensor]] = []  # tensors are held, so that no address is used twice

    def watch(path: str) -> Any:
        return lambda _module, args: order.append((path, args[0]))

    handles = [model.get_submodule(path).register_forward_pre_hook(watch(path)) for path in paths]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[str]] = []
    last: Tensor | None = None
    for path, x in order:
        if x is last:
            groups[-1].append(path)
        else:
            groups.append([path])
        last = x
    return groups


@torch.no_grad()
def _moments(model: nn.Module, path: str, originals: Originals, batches: Sequence[Mapping[str, Tensor]]) -> Moments:
    """Over all tokens that count."""
    sums: list[Tensor] = []
    count = 0
    for batch in batches:
        with originals.restored(model):
            x = _input(model, path, batch)
        q = _input(model, path, batch)
        pairs = [x.mT @ x, q.mT @ x, q.mT @ q]
        sums = [s + p for s, p in zip(sums, pairs, strict=True)] if sums else pairs
        count += len(x)
    return Moments(*(s.float() / count for s in sums))


def _input(model: nn.Module, path: str, batch: Mapping[str, Tensor]) -> Tensor:
    """What a layer reads, [tokens, I], without padding; the layers after it do not run."""
    kept: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept.append(args[0].detach())
        raise _Reached

    handle = model.get_submodule(path).register_forward_pre_hook(stop)
    try:
        model(**batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    x, mask = kept[0], batch.get("attention_mask")
    rows = x[mask.bool()] if mask is not None and mask.shape == x.shape[:-1] else x.flatten(0, -2)
    return rows.double()
