"""Tensor networks: sizes as products of small ones, chains of cores, and a matrix as a chain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.core.evolve import Part, Progress
from weft.core.site import Site

__all__ = [
    "bonds", "chain", "drop_directions", "factors", "grow_bonds", "matrix_chain", "packed_bonds", "rounded",
    "trains",
]  # fmt: skip


def factors(size: int, count: int) -> tuple[int, ...]:
    """`count` numbers, as equal as can be found quickly, whose product is `size`; the smallest first."""
    primes: list[int] = []
    rest, p = size, 2
    while p * p <= rest:
        while rest % p == 0:
            primes, rest = [*primes, p], rest // p
        p += 1
    made = [1] * count
    for prime in reversed([*primes, rest]):
        made[made.index(min(made))] *= prime
    return tuple(sorted(made))


def bonds(sizes: Sequence[int], rank: int | Sequence[int]) -> list[int]:
    """The sizes of a chain's bonds, ends included: `rank`, one for all or each its own, or less where one side of a
    bond has fewer entries."""
    wanted = [rank] * (len(sizes) - 1) if isinstance(rank, int) else rank
    inner = (min(r, math.prod(sizes[:k]), math.prod(sizes[k:])) for k, r in enumerate(wanted, start=1))
    return [1, *inner, 1]


def chain(cores: Sequence[Tensor]) -> Tensor:
    """What cores [r, n, r'] make together, [first r, product of all n, last r'].

    Cores of a matrix, [r, m, n, r'], make [first r, product of all m, product of all n, last r'].
    """
    made = cores[0]
    for core in cores[1:]:
        if core.ndim == 3:
            made = torch.einsum("anb,bmc->anmc", made, core).flatten(1, 2)
        else:
            made = torch.einsum("amnb,bpqc->ampnqc", made, core).flatten(1, 2).flatten(2, 3)
    return made


def _folded(w: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """A matrix [product of rows, product of columns] with a dimension for each: row, column, row, column, ..."""
    order = [axis for k in range(len(rows)) for axis in (k, len(rows) + k)]
    return w.reshape(*rows, *columns).permute(order)


def packed_bonds(w: Tensor, rows: Sequence[int], columns: Sequence[int], rank: int) -> tuple[int, ...]:
    """The sizes of a chain's bonds, ends left out, that hold most of a matrix, or of several [..., O, I] alike, in
    cores of no more numbers than bonds of size `rank` would make.

    What a bond of size r holds is the sum of its r largest squared singular values: what it leaves out bounds the error
    of the chain, bond by bond, so that the best sizes are a packing. It is solved exactly, by the cost and the value of
    all chains so far that no other one beats (Ghadiri, Fahrbach, Fu and Mirrokni 2023, arXiv 2302.03886).
    """
    sizes = [m * n for m, n in zip(rows, columns, strict=True)]
    ends, weights = bonds(sizes, rank), w.reshape(-1, math.prod(rows), math.prod(columns))
    budget = sum(a * n * b for a, n, b in zip(ends, sizes, ends[1:], strict=False))
    best: dict[int, list[tuple[int, float, tuple[int, ...]]]] = {1: [(0, 0.0, ())]}
    for k in range(1, len(sizes)):
        held = _held([_folded(w, rows, columns).reshape(math.prod(sizes[:k]), -1) for w in weights])
        found: dict[int, list[tuple[int, float, tuple[int, ...]]]] = {}
        for before, chains in best.items():
            for r, value in enumerate(held, start=1):
                step, least = before * sizes[k - 1] * r, r * sizes[k] + sum(sizes[k + 1 :])
                fitting = [(c + step, v + value, (*path, r)) for c, v, path in chains if c + step + least <= budget]
                if not fitting:
                    break
                found.setdefault(r, []).extend(fitting)
        best = {r: _unbeaten(chains) for r, chains in found.items()}
    return max((chains[-1] for chains in best.values()), key=lambda c: c[1])[2]


def _held(matrices: Sequence[Tensor]) -> list[float]:
    """The sum of the r largest squared singular values, for r = 1, 2, ...; of several matrices together."""
    squares: Tensor | None = None
    for m in matrices:
        m = m.double() if m.shape[0] <= m.shape[1] else m.double().mT
        own = torch.linalg.eigvalsh(m @ m.mT).flip(0).clamp(min=0)
        squares = own if squares is None else squares + own
    assert squares is not None, "there is a weight"
    total: list[float] = squares.cumsum(0).tolist()
    return total


def _unbeaten(chains: list[tuple[int, float, tuple[int, ...]]]) -> list[tuple[int, float, tuple[int, ...]]]:
    """Those that cost more only where they hold more, the cheapest first."""
    kept: list[tuple[int, float, tuple[int, ...]]] = []
    for each in sorted(chains, key=lambda c: (c[0], -c[1])):
        if not kept or each[1] > kept[-1][1]:
            kept.append(each)
    return kept


def matrix_chain(w: Tensor, rows: Sequence[int], columns: Sequence[int], rank: int | Sequence[int]) -> list[Tensor]:
    """A matrix [product of rows, product of columns] as a chain of cores [r, row, column, r'] with bonds up to `rank`,
    or of the sizes that it names.

    One singular value decomposition after another from the left (Oseledets 2011, doi 10.1137/090752286): exact where
    these are large enough, and within sqrt(number of cores - 1) of the best chain elsewhere.
    """
    rest, cores = _folded(w, rows, columns), []
    sizes = [m * n for m, n in zip(rows, columns, strict=True)]
    bond = bonds(sizes, rank)
    for k in range(len(rows) - 1):
        u, s, v = torch.linalg.svd(rest.reshape(bond[k] * sizes[k], -1), full_matrices=False)
        r = bond[k + 1]
        cores.append(u[:, :r].reshape(bond[k], rows[k], columns[k], r))
        rest = s[:r, None] * v[:r]
    return [*cores, rest.reshape(bond[-2], rows[-1], columns[-1], 1)]


def rounded(cores: Sequence[Tensor], tolerance: float) -> list[Tensor]:
    """A chain without the directions of its bonds whose singular values are below `tolerance` times the largest.

    They become zero on both sides of the bond, where no gradient reaches them any more; shapes stay. The rank of every
    bond so follows what was learnt (Stoudenmire and Schwab 2016, arXiv 1605.05775, pair by pair while they train).
    """
    made = list(cores)
    for k in reversed(range(1, len(made))):  # from the right: each core orthonormal, so that only its bond is seen
        q, r = torch.linalg.qr(made[k].flatten(1).mT)
        made[k] = q.mT.unflatten(1, made[k].shape[1:])
        made[k - 1] = torch.tensordot(made[k - 1], r.mT, 1)
    for k in range(len(made) - 1):
        u, s, v = torch.linalg.svd(made[k].flatten(0, -2), full_matrices=False)
        s = torch.where(s >= tolerance * s[:1], s, 0.0)
        made[k] = (u * (s > 0)).unflatten(0, made[k].shape[:-1])
        made[k + 1] = torch.tensordot(s[:, None] * v, made[k + 1], 1)
    for k, core in enumerate(cores):
        missing = core.shape[-1] - made[k].shape[-1], core.shape[0] - made[k].shape[0]
        made[k] = F.pad(made[k], (0, missing[0], *[0] * (2 * core.ndim - 4), 0, missing[1]))
    return made


def drop_directions(parts: Sequence[Part], names: Sequence[str], tolerance: float) -> None:
    """`rounded` for the cores of these names at every part; at experts, for each of them."""
    for part in parts:
        cores = {name: part.tensors[name] for name in names}
        several = part.site.experts is not None
        for e in range(part.site.experts or 1):
            one = [core[e] if several else core for core in cores.values()]
            for core, new in zip(one, rounded(one, tolerance), strict=True):
                core.copy_(new)
        for name, core in cores.items():
            part.restart(name, torch.ones_like(core, dtype=torch.bool))  # its entries mean something else now


def trains(site: Site, sizes: Mapping[str, Sequence[int]], bond: int, *, growing: bool) -> dict[str, Tensor]:
    """Normal cores [r, n, r'] of matrices [all sizes but the last, the last], by name, spread as LoRETTA's authors do.

    Bonds are `bond` or less; where they are to grow, all but the first row of the core at their right is zero.
    """
    cores = {}
    for name, own in sizes.items():
        ends, spread = bonds(own, bond), (math.prod(own[:-1]) + own[-1]) ** (-0.5 / len(own))
        for k, n in enumerate(own):
            core = site.normal(ends[k], n, ends[k + 1], std=spread * ends[k + 1] ** -0.5, salt=f"{name}{k}")
            core[1 if growing else ends[k] :] = 0.0
            cores[f"{name}{k}"] = core
    return cores


def grow_bonds(parts: Sequence[Part], names: Sequence[str], growths: int, progress: Progress) -> None:
    """Let one bond after another of each site grow by one, `growths` times together in the first half of the steps.

    names: the cores at the right of a bond, whose rows beyond the bond's size are zero. It is the bond whose next row
    the loss has been steepest in since the last growth. Rows that are not used yet stay zero.
    """
    count = int(growths * min(2 * progress.share, 1.0))
    for part in parts:
        cores = [part.tensors[name] for name in names]
        used = part.state.setdefault("used", cores[0].new_ones(len(names)))
        slopes = part.state.setdefault("slopes", cores[0].new_zeros(len(names)))
        for i, core in enumerate(cores):
            if core.grad is not None and used[i] < core.shape[-3]:
                slopes[i] += core.grad.select(-3, int(used[i])).square().sum()
        room = used < used.new_tensor([core.shape[-3] for core in cores])
        if used.sum() - len(names) < count and bool(room.any()):
            used[slopes.where(room, -1.0).argmax()] += 1
            slopes.zero_()
        for i, (name, core) in enumerate(zip(names, cores, strict=True)):
            unused = torch.zeros_like(core, dtype=torch.bool)
            unused.narrow(-3, int(used[i]), core.shape[-3] - int(used[i])).fill_(True)
            core.masked_fill_(unused, 0.0)
            part.restart(name, unused)
