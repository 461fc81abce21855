"""The way `principal`: an adapter as LoRA, of a rank for each site by the singular values of what it changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.attach import attach_plan, detach, records
from weft.combining import combine
from weft.compress import Code
from weft.compressing.measure import Roots, lost, num_bytes, root_at, wide
from weft.compressing.rungs import Chosen, Rung
from weft.core.method import Frozen
from weft.core.site import Site
from weft.core.thin import singular
from weft.differences import Difference, differences, flat, with_kernel
from weft.registry import method_from_spec
from weft.targets import Plan, resolve

__all__ = ["EXACT", "Ranks"]

EXACT = 1e-5
"""The share of a change's norm that is rounding: what a conversion may lose that should lose nothing."""


@dataclass(frozen=True)
class _Parts:
    """A change as sum_n size_n u_n row_n, u_n and row_n of norm 1, what counts most first.

    u [..., O, N], rows [..., N, I], sizes [..., N]. weights [..., N]: the norm of each as losses are measured.
    """

    u: Tensor
    rows: Tensor
    sizes: Tensor
    weights: Tensor

    @staticmethod
    def of(change: Difference, root: Tensor | None) -> _Parts:
        site = change.site
        if change.factored:
            b, a = wide(change.b), flat(wide(change.a), site)
            if root is None:
                u, s, v = singular(b, a)
                return _Parts(u, v, s, s)
            u, s, _ = singular(b, a @ root.to(a))
            rows = (u.mT @ b) @ a
        else:
            dense = flat(wide(change.weight()), site)
            if root is None:
                u, s, v = torch.linalg.svd(dense, full_matrices=False)
                return _Parts(u, v, s, s)
            u, s, _ = torch.linalg.svd(dense @ root.to(dense), full_matrices=False)
            rows = u.mT @ dense
        sizes = rows.norm(dim=-1)
        return _Parts(u, rows / sizes.clamp(min=torch.finfo(rows.dtype).tiny).unsqueeze(-1), sizes, s)

    def shares(self) -> list[float]:
        """By rank, from 1: what of the norm is lost; of experts the worst."""
        left = self.weights.square().flip(-1).cumsum(-1).flip(-1)  # of what is lost by keeping the first n
        whole = left[..., :1].clamp(min=torch.finfo(left.dtype).tiny)
        shares = (left / whole).sqrt().reshape(-1, left.shape[-1]).amax(0)
        return [*shares[1:].tolist(), 0.0]

    def cut(self, rank: int, site: Site) -> dict[str, Tensor | Frozen]:
        """A and B of a LoRA of that rank, at scale 1."""
        root = self.sizes[..., :rank].sqrt()
        b, a = self.u[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * self.rows[..., :rank, :]
        return {
            "A": with_kernel(a, site).to(site.dtype).contiguous(),
            "B": b.to(site.dtype).contiguous(),
        }


class Ranks:
    """What an adapter changes, in thin matrices. Sites that change a norm or a bias are kept whole.

    With roots of the inputs, what is kept is what the outputs on these need: the change is projected on the leading
    left singular vectors of D L, which is the nearest of that rank in the norm of the outputs.
    """

    def __init__(self, model: nn.Module, source: str, name: str, roots: Roots | None = None):
        self.model, self.source, self.name, self.roots = model, source, name, roots
        self.codes: dict[str, Code] = {}
        self.plan: Plan = combine(model, [source], name=name, loss=EXACT).plan
        self.kept: dict[str, dict[str, Tensor | Frozen]] = {}
        self.parts: dict[str, _Parts] = {}
        changes = differences(model, source)
        for planned in self.plan.sites:
            address = planned.site.address
            if planned.method.name == "lora":
                self.parts[address] = _Parts.of(changes[address], root_at(roots, address))
            else:
                adapter = records(model)[name].adapters[address]
                self.kept[address] = {k: t.detach().clone() for k, t in adapter.tensors().items()}
        self.norms = {address: float(parts.weights.norm()) for address, parts in self.parts.items()}

    def ladder(self) -> dict[str, list[Rung]]:
        """Every rank of every site, with the share of the norm that is in the singular values that it cuts."""
        found = {}
        for planned in self.plan.sites:
            site = planned.site
            if site.address in self.parts:
                parts = self.parts[site.address]
                size = (parts.u.shape[-2] + parts.rows.shape[-1]) * (site.experts or 1) * site.dtype.itemsize
                found[site.address] = [Rung(r * size, loss, r) for r, loss in enumerate(parts.shares(), start=1)]
        return found

    def put(self, chosen: Chosen) -> None:
        """Write the adapter with these ranks."""
        specs: dict[str, dict[str, Any]] = {}
        tensors: dict[str, Mapping[str, Tensor | Frozen]] = {}
        for planned in self.plan.sites:
            site = planned.site
            if site.address in self.kept:
                specs[site.address], tensors[site.address] = {"method": "full"}, self.kept[site.address]
                continue
            rank = chosen[site.address].setting
            specs[site.address] = {"method": "lora", "rank": rank, "alpha": float(rank)}
            tensors[site.address] = self.parts[site.address].cut(rank, site)
        detach(self.model, self.name)
        main = max((r.setting for r in chosen.values()), default=None)
        spec = {"name": "full"} if main is None else {"name": "lora", "rank": main, "alpha": float(main)}
        plan = resolve(self.model, method_from_spec(spec), specs, name=self.name, tied=self.plan.tied)
        attach_plan(self.model, dataclasses.replace(plan, targets=self.plan.targets), tensors=tensors)

    def losses(self) -> dict[str, float]:
        """What is lost, measured on the adapter as it is."""
        return lost(self.model, self.source, self.name, self.roots)

    def num_bytes(self) -> int:
        """Of the adapter as it is."""
        return num_bytes(self.model, self.name)
