"""What an adapter loses by being made smaller: of the norm of its change, of its output, or of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapter import native_tensors
from weft.attach import records
from weft.calibrate import collect
from weft.core.thin import singular
from weft.differences import Difference, differences, flat
from weft.errors import AdapterError
from weft.registry import method_from_spec

__all__ = ["Roots", "input_roots", "lost", "norm", "num_bytes", "root_at", "share", "tensors_share", "wide"]

Roots = Mapping[str, Tensor]
"""By address, L [I, I] with L L^T the mean of x x^T over the inputs x of a site: |D L| is the size of D x."""


@torch.no_grad()
def lost(model: nn.Module, before: str, after: str, roots: Roots | None = None) -> dict[str, float]:
    """By address, the norm of the difference between what two adapters change, as a share of what the first does.

    roots: of the inputs (`input_roots`): then of what they change of the output on these.
    """
    old, new = differences(model, before), differences(model, after)
    found = {}
    for address, change in old.items():
        root, kept = root_at(roots, address), [(-1.0, new[address])] if address in new else []
        found[address] = share(norm([(1.0, change), *kept], root), norm([(1.0, change)], root))
    return found


def root_at(roots: Roots | None, address: str) -> Tensor | None:
    """The root for one site, where outputs are compared."""
    return None if roots is None else roots[address]


def share(left: float, whole: float) -> float:
    """What is left over as a share of what there was; of nothing, all of it."""
    return left / whole if whole else float(left > 0)


def norm(parts: list[tuple[float, Difference]], root: Tensor | None = None) -> float:
    """The Frobenius norm of a sum of changes, times L where there is one; of thin ones without building them."""
    if all(d.factored for _, d in parts):
        b = torch.cat([factor * wide(d.b) for factor, d in parts], -1)
        a = torch.cat([_seen(flat(wide(d.a), d.site), root) for _, d in parts], -2)
        return float(singular(b, a)[1].norm())
    first, *others = [factor * _seen(wide(d.weight()), root) for factor, d in parts]
    return float(sum(others, start=first).norm())


def wide(t: Tensor | None) -> Tensor:
    """In a precision that small differences can bear."""
    assert t is not None, "a change has one of two forms"
    return t.double()


def _seen(m: Tensor, root: Tensor | None) -> Tensor:
    return m if root is None else m @ root.to(m)


def tensors_share(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> float:
    """The largest norm of a tensor's difference as a share of the tensor's own: where no weight expresses a change."""
    shares = [0.0]
    for name, tensor in old.items():
        if tensor.is_floating_point():
            left = float((tensor.double() - new[name].double()).norm())
            shares.append(share(left, float(tensor.double().norm())))
    return max(shares)


@torch.no_grad()
def input_roots(model: nn.Module, name: str, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Roots of the inputs of an adapter's sites, as the base computes them on batches of data (`weft.calibrate`).

    Raises AdapterError for a site that is no linear map of the last dimension of what it is called with.
    """
    plan = records(model)[name].plan
    reads_inputs = method_from_spec({"name": "lora", "start": "eva"})
    for planned in plan.sites:
        if planned.site.kind != "linear":
            raise AdapterError(
                f"{planned.site.address} is of kind {planned.site.kind}: a loss in the output is measured at linear "
                "maps; state it in the weights (--loss-in weights) or on data (--eval)"
            )
    sites = tuple(dataclasses.replace(planned, method=reads_inputs) for planned in plan.sites)
    found = collect(model, dataclasses.replace(plan, sites=sites), batches)
    return {address: _root(statistics["covariance"]) for address, statistics in found.items()}


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance.double())
    return vectors * values.clamp(min=0).sqrt()


def num_bytes(model: nn.Module, name: str) -> int:
    """Bytes of an adapter's tensors."""
    return sum(t.numel() * t.element_size() for t in native_tensors(records(model)[name]).values())
