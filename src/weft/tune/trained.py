"""What is trained, tensor by tensor: names, layers, components, and which tensors are the factors of one update."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.attach import records
from weft.core.method import Frozen, Method
from weft.core.site import Site
from weft.optim import Pair, Trained
from weft.targets import Plan, structure

__all__ = ["Tensors", "planned_tensors", "trained_tensors"]


@dataclass(frozen=True, eq=False)
class Tensors:
    """All that trains, in the order of the adapter's file. copies: names of tensors that start as the base's own."""

    trained: tuple[Trained, ...]
    pairs: tuple[Pair, ...] = ()
    copies: tuple[str, ...] = ()

    def components(self) -> list[list[nn.Parameter]]:
        """The tensors of one name at the modules of one name over all layers: what component-wise clipping goes by."""
        found: dict[str, list[nn.Parameter]] = {}
        for each in self.trained:
            found.setdefault(each.component, []).append(each.parameter)
        return [*found.values()]

    @classmethod
    def plain(cls, parameters: Mapping[str, nn.Parameter]) -> Tensors:
        """Parameters of which no more is known than their names."""
        return cls(tuple(Trained(name, p, component=name) for name, p in parameters.items()))

    def in_float32(self) -> Tensors:
        """The same on the meta device, as an optimiser meets them under master weights."""
        made = {id(t.parameter): nn.Parameter(t.parameter.to("meta", torch.float32)) for t in self.trained}
        trained = [dataclasses.replace(t, parameter=made[id(t.parameter)]) for t in self.trained]
        pairs = [
            dataclasses.replace(p, down=made.get(id(p.down), p.down), up=made.get(id(p.up), p.up)) for p in self.pairs
        ]
        return Tensors(tuple(trained), tuple(pairs), self.copies)


def trained_tensors(model: nn.Module, name: str) -> Tensors:
    """What an attached adapter trains."""
    record = records(model)[name]
    shared = [(method, holder.tensors()) for method, holder in record.shared.items()]
    return _collect(((a.method, a.site, {**a._parameters, **a._buffers}) for a in record.adapters.values()), shared)


def planned_tensors(plan: Plan) -> Tensors:
    """What a plan will train, on the meta device: nothing is attached or allocated."""
    shared = [(name, _as_held(made)) for name, made in plan.shared("meta").items()]
    return _collect(((s.method, s.site, _as_held(structure(s.method, s.site))) for s in plan.sites), shared)


def _collect(
    sites: Iterator[tuple[Method, Site, Mapping[str, Tensor | None]]],
    shared: list[tuple[str, dict[str, Tensor]]],
) -> Tensors:
    trained, pairs, copies = [], [], []
    for method, site, held in sites:
        word = site.address.rpartition(".")[2]
        for key, value in held.items():
            if isinstance(value, nn.Parameter):
                trained.append(Trained(f"{site.address}.{key}", value, site.layer, f"{word}.{key}"))
        copies += [f"{site.address}.{key}" for key in method.copies if isinstance(held.get(key), nn.Parameter)]
        for low, high in method.pairs:
            if low not in held:  # an update that only some options have
                continue
            down, up = held[low], held[high]
            assert isinstance(down, Tensor), "a method's pairs are tensors of its own"
            assert isinstance(up, Tensor), "a method's pairs are tensors of its own"
            if isinstance(down, nn.Parameter) or isinstance(up, nn.Parameter):
                pairs.append(Pair(down, up, site.groups, site.experts is not None))
    for name, tensors in shared:
        for key, value in tensors.items():
            if isinstance(value, nn.Parameter):
                trained.append(Trained(f"shared.{name}.{key}", value, None, f"shared.{key}"))
    return Tensors(tuple(trained), tuple(pairs), tuple(copies))


def _as_held(made: Mapping[str, Tensor | Frozen]) -> dict[str, Tensor]:
    """Tensors as an adapter would hold them: parameters, and buffers for what is frozen or whole numbers."""
    held: dict[str, Tensor] = {}
    for key, value in made.items():
        if isinstance(value, Frozen) or not value.is_floating_point():
            held[key] = value.tensor if isinstance(value, Frozen) else value
        else:
            held[key] = nn.Parameter(torch.empty_like(value, device="meta"))
    return held
