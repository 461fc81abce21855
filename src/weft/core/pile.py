"""The many reading: adapters that are trained at once keep their tensors as rows of stacked leaves, [K, ...]."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._C._functorch import _add_batch_dim, _remove_batch_dim
from torch._functorch.vmap import vmap_increment_nesting

from weft.core.adapter import Adapter
from weft.core.op import Op

__all__ = ["Heap", "Pile", "Piles", "likeness"]


def likeness(adapter: Adapter) -> Hashable:
    """Adapters with equal values here run as one call: the same method with tensors of the same shapes.

    A body that picks tensors by what is given for a row, or that reads whole layers or texts, cannot be given stacked
    tensors.
    """
    if adapter.method.reads_batch:
        return id(adapter)
    return adapter.method, tuple((k, t.shape, t.dtype) for k, t in adapter.tensors().items())


class Heap:
    """Equal holders (one site's of K adapters, or what their sites share) with their tensors stacked.

    A holder's parameter becomes a view of its row: what an optimiser writes into it, the stack has. Autograd sees the
    stack alone; `deal` gives every parameter its row of the gradient.
    """

    def __init__(self, holders: Sequence[nn.Module]):
        own = [{**h._parameters, **h._buffers} for h in holders]
        self.tensors: dict[str, Tensor] = {}
        self._rows: list[tuple[Tensor, list[tuple[nn.Parameter, Tensor]]]] = []
        for name, first in own[0].items():
            each: list[Tensor] = [t[name] for t in own]  # type: ignore[misc]
            stack = self.tensors[name] = torch.stack([t.detach() for t in each])
            if isinstance(first, nn.Parameter):
                stack.requires_grad_(first.requires_grad)
                self._rows.append((stack, list(zip(each, stack.detach().unbind(), strict=True))))  # type: ignore[arg-type]
        self.refresh()

    def refresh(self) -> None:
        """Take in what was written elsewhere: an optimiser may give a parameter other memory."""
        for _, rows in self._rows:
            for parameter, row in rows:
                if parameter.data_ptr() != row.data_ptr():
                    row.copy_(parameter.detach())
                    parameter.data = row

    def deal(self) -> None:
        """Give every parameter the gradient that its row of the stack has come to; the stacks have none afterwards."""
        for stack, rows in self._rows:
            if stack.grad is not None:
                for (parameter, _), found in zip(rows, stack.grad.unbind(), strict=True):
                    parameter.grad = found if parameter.grad is None else parameter.grad.add_(found)
                stack.grad = None

    def part(self) -> None:
        """Give every parameter memory of its own again."""
        for _, rows in self._rows:
            for parameter, _ in rows:
                parameter.data = parameter.detach().clone()


def mapped(
    function: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], tensors: Mapping[str, Tensor], size: int
) -> dict[str, Tensor]:
    """torch.vmap of a function of named tensors [K, ...], without its search through nested arguments: that takes ten
    times as long as what a small method computes, at every site and step."""
    if torch.compiler.is_compiling():
        return dict(torch.vmap(function, randomness="different")(tensors))
    with vmap_increment_nesting(size, "different") as level:
        found = function({k: _add_batch_dim(t, 0, level) for k, t in tensors.items()})
        return {k: _remove_batch_dim(t, level, size, 0) for k, t in found.items()}


class Pile:
    """Several adapters of one likeness at one site, with their heaps; while it lives, they know it."""

    def __init__(self, members: Sequence[Adapter], heaps: Sequence[Heap]):
        self.members = tuple(members)
        self.tensors = {k: t for heap in heaps for k, t in heap.tensors.items()}
        self._places = {id(a): k for k, a in enumerate(self.members)}
        for adapter in self.members:
            adapter.__dict__["pile"] = self

    def coefficients(self, members: Sequence[Adapter], op: Op) -> Mapping[str, Tensor]:
        """What the method's forward uses, stacked [K, ...], of the members in this order."""
        for adapter in members:
            adapter.forget()  # a step may follow that writes behind the version counter
        tensors, places = self.tensors, [self._places[id(a)] for a in members]
        if places != [*range(len(self.members))]:
            index = torch.tensor(places, device=next(iter(tensors.values())).device)
            tensors = {k: t.index_select(0, index) for k, t in tensors.items()}
        if members[0].plain:
            return tensors
        return mapped(lambda t: members[0].method.coefficients(t, op), tensors, len(members))


class Piles:
    """Every pile that the adapters of these sites make: alike ones at one site, where there are two or more."""

    def __init__(self, sites: Iterable[Sequence[Adapter]]):
        self.heaps: dict[tuple[int, ...], Heap] = {}
        self.piles = [Pile(group, [*self._heaps(group)]) for adapters in sites for group in _alike(adapters)]

    def _heaps(self, group: Sequence[Adapter]) -> Iterator[Heap]:
        """First what all sites share, stacked once, then the site's own."""
        shared: list[nn.Module] = [a.shared for a in group if a.shared is not None]
        for holders in (shared, [*group]) if shared else ([*group],):
            key = tuple(id(each) for each in holders)
            if key not in self.heaps:
                self.heaps[key] = Heap(holders)
            yield self.heaps[key]

    def deal(self) -> None:
        """After a backward: every parameter gets its gradient."""
        for heap in self.heaps.values():
            heap.deal()

    def refresh(self) -> None:
        """After an optimiser's step: every stack has what was written."""
        for heap in self.heaps.values():
            heap.refresh()

    def part(self) -> None:
        """Leave the adapters as they were before they were piled."""
        for pile in self.piles:
            for adapter in pile.members:
                adapter.__dict__.pop("pile", None)
        for heap in self.heaps.values():
            heap.part()


def _alike(adapters: Sequence[Adapter]) -> Iterator[list[Adapter]]:
    groups: dict[Hashable, list[Adapter]] = {}
    for adapter in adapters:
        if adapter.site.experts is None:  # fused experts run once per adapter, on the rows of each
            groups.setdefault(likeness(adapter), []).append(adapter)
    yield from (group for group in groups.values() if len(group) > 1)
