"""What an adapter would cost: parameters, FLOPs and bytes, read from the method's own body on the meta device."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from weft.core.adapter import Adapter, Shared
from weft.core.method import Frozen, Method
from weft.core.op import ConvOp, DataOp, LookupOp
from weft.core.positions import Positions
from weft.core.site import Site
from weft.targets import PlannedSite, Targets, resolve, structure

__all__ = ["Cost", "cost"]


@dataclass(frozen=True)
class Cost:
    """What an adapter adds.

    parameters: trained numbers. frozen: numbers that are stored and not trained. bytes: of both, as stored.
    flops_per_token: forward, beyond the frozen maps; base_flops_per_token: of these maps themselves. A multiply and an
        add are two. Convolutions count one output position, experts one expert.
    flops_per_step: making the coefficients, once per step.
    uncounted: sites whose cost is not in their own body (virtual tokens make every layer longer).
    """

    parameters: int
    frozen: int
    bytes: int
    flops_per_token: int
    base_flops_per_token: int
    flops_per_step: int
    uncounted: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = self.flops_per_token / max(1, self.base_flops_per_token)
        lines = [
            f"trained parameters    {self.parameters:,}",
            f"stored, not trained   {self.frozen:,}",
            f"bytes                 {self.bytes:,}",
            f"FLOPs per token       {self.flops_per_token:,} ({100 * share:.2f} % of the adapted maps' own)",
            f"FLOPs per step        {self.flops_per_step:,}",
        ]
        return "\n".join(lines + [f"not counted           {', '.join(self.uncounted)}"] * bool(self.uncounted))


def cost(
    model: nn.Module,
    method: Method,
    targets: Targets | None = None,
    *,
    layers: str | Collection[int] | None = None,
    exclude: Sequence[str] = (),
) -> Cost:
    """The cost of attaching `method` to `targets` of a model; nothing is changed and nothing is allocated.

    model: any torch module, on the meta device too. targets, layers, exclude: see `weft.resolve`.
    """
    plan = resolve(model, method, targets, layers=layers, exclude=exclude)
    shared = plan.shared("meta")
    total = [0] * 6
    for holder in shared.values():
        total = _add(total, [*_sizes(holder), 0, 0, 0])
    uncounted = []
    for planned in plan.sites:
        tensors = structure(planned.method, planned.site)
        flops = _flops(planned, tensors, shared.get(planned.method.name, {}))
        if flops is None:
            uncounted.append(planned.site.address)
        total = _add(total, [*_sizes(tensors), *(flops or (0, 0, 0))])
    parameters, frozen, size, own, base, step = total
    return Cost(parameters, frozen, size, own, base, step, uncounted=tuple(uncounted))


def _add(a: list[int], b: list[int]) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _sizes(tensors: Mapping[str, Tensor | Frozen]) -> tuple[int, int, int]:
    """Trained numbers, other numbers, bytes."""
    trained = frozen = size = 0
    for value in tensors.values():
        tensor = value.tensor if isinstance(value, Frozen) else value
        size += tensor.numel() * tensor.element_size()
        if isinstance(value, Frozen) or not tensor.is_floating_point():
            frozen += tensor.numel()
        else:
            trained += tensor.numel()
    return trained, frozen, size


class _Meta:
    """A frozen map without numbers."""

    def __init__(self, site: Site):
        self.site = site

    def call(self, x: Tensor) -> Tensor:
        site = self.site
        if site.kind == "embedding":
            return torch.empty(*x.shape, site.out_features, device="meta", dtype=site.dtype)
        if site.kind == "conv":
            return self.conv(x, self.weight())
        return torch.nn.functional.linear(x, self.weight())

    def weight(self) -> Tensor:
        return torch.empty(self.site.shape, device="meta", dtype=self.site.dtype)

    def bias(self) -> Tensor | None:
        site = self.site
        return torch.empty(site.out_features, device="meta", dtype=site.dtype) if site.has_bias else None

    def training(self) -> bool:
        return False

    def linear(self) -> bool:
        return False

    def held_in(self) -> Mapping[str, Tensor | None]:
        return {}

    def given(self, name: str, count: int) -> Tensor:  # noqa: ARG002  any will do: a cost is the same for all
        return torch.zeros((), dtype=torch.long, device="meta")

    def positions(self, x: Tensor) -> Positions:
        return Positions.of_whole_rows(x)

    def num_seen(self) -> int:
        return 0

    def hidden(self) -> list[Tensor]:
        return []

    def invoked(self, x: Tensor, tokens: tuple[int, ...]) -> Tensor:  # noqa: ARG002
        return torch.ones(1, dtype=torch.bool, device=x.device)

    def conv(self, x: Tensor, kernel: Tensor) -> Tensor:
        functional = torch.nn.functional
        conv = (functional.conv1d, functional.conv2d, functional.conv3d)[len(self.site.kernel_size) - 1]
        return conv(x, kernel, groups=self.site.groups)


_OPS: dict[str, type[DataOp]] = {
    "linear": DataOp, "experts": DataOp, "block": DataOp, "conv": ConvOp, "embedding": LookupOp,
}  # fmt: skip
_KNOWN: dict[Any, tuple[int, int, int]] = {}


def _flops(
    planned: PlannedSite, tensors: Mapping[str, Tensor | Frozen], shared: Mapping[str, Tensor | Frozen]
) -> tuple[int, int, int] | None:
    """(beyond the map, of the map, of the coefficients) for one token; None for a kind whose cost lies elsewhere."""
    if planned.site.kind == "norm":
        return 0, 0, 0  # elementwise
    if planned.site.kind not in _OPS or planned.method.surveys:  # of a survey, in a pass of the base
        return None
    site = replace(planned.site, device="meta", experts=None)
    if not shared:  # alike sites cost alike; what sites share, a method may find by where a site is
        site = replace(site, address="", layer=None, index=0, count=1)
    key = planned.method, site
    if key not in _KNOWN:
        one = structure(planned.method, site) if planned.site.experts is not None else tensors
        adapter = Adapter(planned.method, site, one, Shared(shared) if shared else None)
        op = _OPS[site.kind](site, _Meta(site))
        x = _one_token(site)
        with torch.no_grad():
            base = _count(lambda: op(x))
            step = _count(lambda: adapter.coefficients(op))
            _KNOWN[key] = _count(lambda: adapter.run(x, op)) - step - base, base, step
    return _KNOWN[key]


def _one_token(site: Site) -> Tensor:
    if site.kind == "embedding":
        return torch.zeros(1, 1, dtype=torch.long, device="meta")
    if site.kind == "conv":
        return torch.empty(1, site.in_features, *site.kernel_size, device="meta", dtype=site.dtype)
    return torch.empty(1, 1, site.in_features, device="meta", dtype=site.dtype)


def _count(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
