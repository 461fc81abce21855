"""Where a tensor of a PEFT folder belongs in a model, and the site, seat and module found there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from weft.adapter import AdapterFileError
from weft.attach import records
from weft.core.site import Site
from weft.errors import nearest
from weft.kinds import Offer, offers
from weft.kinds.seat import Seat, Weave, base_class
from weft.patterns import walk
from weft.targets import PlannedSite, site_of

__all__ = ["Place", "Places", "Unwritable", "ends_of"]


class Unwritable(Exception):
    """Why an adapter cannot be a PEFT folder."""


@dataclass(frozen=True, eq=False)
class Place:
    """One site of a model, with the module that has it.

    path: the module's. address: the site's, which for a bare parameter ends with the parameter's name.
    """

    address: str
    path: str
    module: nn.Module
    offer: Offer
    site: Site

    @cached_property
    def seat(self) -> Seat:
        """How the module's weight is read here; never registered in the model."""
        return self.offer.seat(self.module, self.site, Weave(), self.offer.param)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, [O, I, *kernel]."""
        return self.seat.weight().detach()

    @property
    def base(self) -> type[nn.Module]:
        """The class of the module without adapters."""
        return base_class(self.module)

    @property
    def is_parameter(self) -> bool:
        """Whether PEFT reaches it through `target_parameters`."""
        return self.offer.own_name and self.offer.kind in ("experts", "linear")


class Places:
    """Every place of a model, by module path; looked up when asked for, since a folder names few of them."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = dict(walk(model))
        self._adapted: dict[str, list[PlannedSite]] = {}
        for site in {s.site.address: s for r in records(model).values() for s in r.plan.sites}.values():
            self._adapted.setdefault(site.path, []).append(site)
        self._offers: dict[str, list[Offer]] = {}

    def planned(self, planned: PlannedSite) -> Place:
        """The place of a site that is adapted."""
        return Place(planned.site.address, planned.path, self.modules[planned.path], planned.offer, planned.site)

    def map_at(self, path: str) -> Place | None:
        """The module's own map: a linear layer, a convolution, an embedding or a norm."""
        for known in self._adapted.get(path, ()):
            if not known.offer.own_name and known.site.kind != "block":
                return self.planned(known)
        own = [o for o in self._at(path) if not o.own_name and o.kind != "block"]
        return self._place(path, own[0]) if own else None

    def parameters_at(self, path: str) -> list[Place]:
        """Bare parameters of a module that can be adapted, in the module's own order."""
        order = list(self.modules[path]._parameters) if path in self.modules else []
        own = [o for o in self._at(path) if o.own_name and o.param in order]
        return [self._place(path, o) for o in sorted(own, key=lambda o: order.index(o.param))]

    def of_kind(self, kind: str) -> list[Place]:
        """All places of a kind, in the model's order."""
        return [self._place(path, o) for path in self.modules for o in self._at(path) if o.kind == kind]

    def order(self, place: Place) -> tuple[int, int]:
        """What sorts places as the model has them."""
        parameters = list(place.module._parameters)
        return self._order[place.path], parameters.index(place.offer.param) if place.offer.param in parameters else 0

    @cached_property
    def _order(self) -> dict[str, int]:
        return {path: i for i, path in enumerate(self.modules)}

    def _at(self, path: str) -> list[Offer]:
        if path not in self._offers:
            above, _, child = path.rpartition(".")
            module = self.modules.get(path)
            self._offers[path] = [] if module is None else [*offers(module, self.modules.get(above), child)]
        return self._offers[path]

    def _place(self, path: str, offer: Offer) -> Place:
        address = ".".join(p for p in (path, offer.param if offer.own_name else "") if p)
        return Place(address, path, self.modules[path], offer, site_of(self.modules[path], address, offer))

    def unknown(self, path: str, folder: object) -> AdapterFileError:
        """The error for a tensor of a module that the model lacks, or that nothing can adapt."""
        if path in self.modules:
            what = f"a {base_class(self.modules[path]).__name__}, which has no weight that Weft adapts"
        else:
            known = [p for p in self.modules if self.map_at(p) is not None]
            what = f"not in this {base_class(self.model).__name__}; {nearest(path, known)}"
        return AdapterFileError(f"{folder} adapts {path!r}, which is {what}")

    def holders(self, weight: Tensor | None) -> list[str]:
        """Paths of the modules that hold this very parameter."""
        if weight is None:
            return []
        return [p for p, m in self.modules.items() if any(t is weight for t in m._parameters.values())]


def ends_of(path: str) -> Iterator[str]:
    """A path, and it without its first parts: all that a name matches which PEFT compares with the end."""
    while path:
        yield path
        path = path.partition(".")[2]
