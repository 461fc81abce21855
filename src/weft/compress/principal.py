"""What adapters have in common: principal directions of existing LoRAs, on which a new one learns coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.core.method import Frozen
from weft.core.thin import singular
from weft.targets import Plan

__all__ = ["Principal", "principal_basis", "principal_tensors"]

Tensors = Mapping[str, Tensor | Frozen]


@dataclass(frozen=True)
class Principal:
    """N adapters of one site as V c_B c_A U: u [K, I] and v [O, K] orthonormal, pairs of c_b [K, R_n] and c_a [R_n, K].

    losses: [N], the share of the norm of each adapter's change that is lost.
    """

    u: Tensor
    v: Tensor
    pairs: Sequence[tuple[Tensor, Tensor]]
    losses: Tensor


@torch.no_grad()
def principal_basis(pairs: Sequence[tuple[Tensor, Tensor]], num_components: int) -> Principal:
    """The changes b_n a_n of many adapters at one site on the principal directions of their factors.

    U and V are the leading right and left singular vectors of all rows of a and all columns of b, which count alike
    whatever scale an adapter has given to one factor at the cost of the other. Nothing is taken off before: a mean that
    adapters share is a direction to keep, where EigenLoRAx looks for what tells adapters apart to learn on
    (`principal_tensors`; Kaushik et al. 2025, arXiv 2502.04700).
    """
    even = [_even(b.double(), a.double()) for b, a in pairs]
    u = _leading(torch.cat([a for _, a in even]), num_components)  # [K, I]
    v = _leading(torch.cat([b.mT for b, _ in even]), num_components).mT  # [O, K]
    made = [(v.mT @ b, a @ u.mT) for b, a in even]
    losses = []
    for (b, a), (cb, ca) in zip(even, made, strict=True):
        whole, held = singular(b, a)[1].square().sum(), singular(cb, ca)[1].square().sum()
        losses.append(((whole - held).clamp(min=0) / whole.clamp(min=torch.finfo(whole.dtype).tiny)).sqrt())
    dtype = pairs[0][0].dtype
    return Principal(u.to(dtype), v.to(dtype), [(cb.to(dtype), ca.to(dtype)) for cb, ca in made], torch.stack(losses))


def _even(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same product of norm-balanced factors: what is stretched is shared between the two."""
    u, s, v = singular(b, a)
    root = s.sqrt()
    return u * root, root[:, None] * v


def _leading(rows: Tensor, count: int) -> Tensor:
    """Orthonormal [K, C]: the leading right singular vectors of rows [N, C]."""
    return torch.linalg.eigh(rows.mT @ rows)[1].mT.flip(0)[:count]


def principal_tensors(plan: Plan, adapters: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> dict[str, Tensors]:
    """Tensors for a plan of EigenLoRAx whose directions come from LoRAs of the same base, by address.

    adapters: for each, its "A" [R, I, *kernel] and "B" [O, R] by address. The rows of A and the columns of B of all of
    them, less their mean, give U and V; where these have fewer directions than the plan keeps, random ones follow,
    orthogonal to them (Kaushik et al. 2025, arXiv 2502.04700). `weft.attach.attach_plan` takes them as `tensors`.
    Raises ValueError for a plan of another method, no adapter, or one that lacks a site or has another shape there.
    """
    if plan.method.name != "eigenlorax":
        raise ValueError(f"principal directions are what eigenlorax learns on; this plan is of {plan.method}")
    if not adapters:
        raise ValueError("no adapter to take directions from: give at least one, or attach the plan as it is")
    made: dict[str, Tensors] = {}
    for planned in plan.sites:
        site = planned.site
        if site.experts is not None:
            raise ValueError(
                f"{site.address} holds {site.experts} experts: directions are taken from one map at a time"
            )
        fresh = dict(planned.method.init(site, None))  # type: ignore[arg-type]  # it reads nothing of the weight
        for name, factor, turned in (("U", "A", False), ("V", "B", True)):
            random = fresh[name]
            assert isinstance(random, Frozen), "directions are saved and never trained"
            rows = [_rows(n, adapter, site.address, factor, turned) for n, adapter in enumerate(adapters)]  # [R, C]
            base = random.tensor.mT if turned else random.tensor.flatten(1)  # [K, C]
            if any(r.shape[1] != base.shape[1] for r in rows):
                sizes = sorted({r.shape[1] for r in rows})
                raise ValueError(f"{site.address} has {base.shape[1]} channels and the adapters' {factor} has {sizes}")
            found = _directions(torch.cat(rows).to(base), base)
            fresh[name] = Frozen((found.mT if turned else found.view_as(random.tensor)).contiguous())
        made[site.address] = fresh
    return made


def _rows(number: int, adapter: Mapping[str, Mapping[str, Tensor]], address: str, factor: str, turned: bool) -> Tensor:
    """Rows of A, or columns of B, of one adapter at a site."""
    if factor not in adapter.get(address, {}):
        raise ValueError(
            f"adapter {number} has no {factor} at {address}: all of them must adapt every site of the plan"
        )
    tensor = adapter[address][factor]
    return tensor.mT if turned else tensor.flatten(1)


def _directions(rows: Tensor, random: Tensor) -> Tensor:
    """Orthonormal [K, C]: principal directions of `rows` [N, C], then `random` ones as far as K of them are wanted."""
    _, s, v = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    known = v[s > s.max() * 1e-6 * max(rows.shape)][: len(random)]
    q = torch.linalg.qr(torch.cat([known, random]).mT)[0].mT
    return torch.cat([known, q[len(known) : len(random)]])
