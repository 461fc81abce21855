"""The ways `bits`, `one_bit` and `compeft`: an adapter's own tensors in code, as few bytes for each site as will do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapter import native_tensors
from weft.attach import records, weave_of
from weft.combining import combine
from weft.compress import Code, few_bits, half, packed, ternary
from weft.compressing.measure import Roots, norm, root_at, share, tensors_share
from weft.compressing.rungs import Chosen, Rung
from weft.core.adapter import Adapter
from weft.differences import Difference, difference
from weft.errors import AdapterError

__all__ = ["SETTINGS", "Codes"]

_GROUPS = (0, 128, 32)
_DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)

SETTINGS: dict[str, tuple[Any, ...]] = {
    "bits": (*((bits, group) for bits in range(1, 9) for group in _GROUPS), (16, 0)),
    "one_bit": tuple((1, group) for group in _GROUPS),
    "compeft": _DENSITIES,
}
"""What may be chosen at a site, by way: bits and group size (0: a row), or the share of entries that are kept."""


class Codes:
    """An adapter whose tensors are what codes stand for: all floating ones at its sites; what sites share stays.

    alpha: of `compeft`, for all of its tensors; by default each has the scale that comes nearest to it.
    """

    def __init__(self, model: nn.Module, source: str, name: str, way: str, roots: Roots | None = None):
        self.model, self.source, self.name, self.way, self.roots = model, source, name, way, roots
        self.codes: dict[str, Code] = {}
        self.alpha: float | None = None
        self.plan = combine(model, [source], name=name).plan
        self.before = {
            address: {k: t.detach().clone() for k, t in _own(adapter).items()}
            for address, adapter in records(model)[source].adapters.items()
        }
        self.changes: dict[str, Difference] | None = {}
        try:
            self.changes = {a: difference(weave_of(model).seats[a], source) for a in self.before}
        except AdapterError:  # no weight expresses it: then it is its tensors that are compared
            if roots is not None:
                raise
            self.changes = None
        self.norms = {
            a: 1.0 if self.changes is None else norm([(1.0, self.changes[a])], root_at(roots, a)) for a in self.before
        }

    def ladder(self) -> dict[str, list[Rung]]:
        """Every setting at every site, with what it loses there, measured."""
        found: dict[str, list[Rung]] = {}
        for address, tensors in self.before.items():
            rungs = []
            for setting in SETTINGS[self.way]:
                codes = dict(self._coded(tensors, setting))
                if not codes:
                    continue
                self._write(address, codes)
                rest = sum(t.numel() * t.element_size() for k, t in tensors.items() if k not in codes)
                rungs.append(Rung(rest + sum(c.num_bytes for c in codes.values()), self._loss(address), setting))
            if rungs:
                found[address] = rungs
        return found

    def put(self, chosen: Chosen) -> None:
        """Write the adapter with these settings."""
        self.codes = {}
        for address, rung in chosen.items():
            codes = dict(self._coded(self.before[address], rung.setting))
            self._write(address, codes)
            self.codes |= {f"{address}.{name}": code for name, code in codes.items()}

    def losses(self) -> dict[str, float]:
        """What is lost, measured on the adapter as it is."""
        return {address: self._loss(address) for address in self.before}

    def num_bytes(self) -> int:
        """Of what is written for it, with the index that says how to read it."""
        tensors, facts = packed(native_tensors(records(self.model)[self.name]), self.codes)
        return sum(t.numel() * t.element_size() for t in tensors.values()) + len(facts["packed"])

    def _coded(self, tensors: Mapping[str, Tensor], setting: Any) -> Iterator[tuple[str, Code]]:
        """A code for every floating tensor; a group size that does not divide one's rows gives none for any."""
        floating = {k: t for k, t in tensors.items() if t.is_floating_point() and t.numel() > 1}
        if self.way == "compeft":
            # gains and shifts start with one value everywhere, matrices about zero
            yield from (
                (
                    k,
                    ternary(
                        t, density=setting, alpha=self.alpha, start=float(t.float().mean()) if t.ndim == 1 else 0.0
                    ),
                )
                for k, t in floating.items()
            )
            return
        bits, group = setting
        if bits == 16:
            yield from ((k, half(t)) for k, t in floating.items())
        elif all(not group or max(t.shape[-2:]) % group == 0 for t in floating.values()):
            yield from ((k, few_bits(t, bits=bits, group_size=group)) for k, t in floating.items())

    @torch.no_grad()
    def _write(self, address: str, codes: Mapping[str, Code]) -> None:
        own = _own(records(self.model)[self.name].adapters[address])
        for name, code in codes.items():
            own[name].copy_(code.tensor())

    def _loss(self, address: str) -> float:
        if self.changes is None:
            return tensors_share(self.before[address], _own(records(self.model)[self.name].adapters[address]))
        new = difference(weave_of(self.model).seats[address], self.name)
        left = norm([(1.0, self.changes[address]), (-1.0, new)], root_at(self.roots, address))
        return share(left, self.norms[address])


def _own(adapter: Adapter) -> dict[str, Tensor]:
    """A site's own tensors, without what all sites share."""
    return {k: t for k, t in {**adapter._parameters, **adapter._buffers}.items() if t is not None}
