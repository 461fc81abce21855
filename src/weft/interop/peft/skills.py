"""Polytropon and multi-head routing as PEFT stores them: an inventory of low-rank factors and logits for every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from weft.adapter import AdapterFileError
from weft.core.method import Method
from weft.interop.peft.config import Config, target_modules, uniform
from weft.interop.peft.family import Family, Tensors, is_linear
from weft.interop.peft.place import Place, Places, Unwritable

_NAMES: Mapping[str, str] = {"r": "rank", "n_tasks": "num_tasks", "n_skills": "num_skills", "n_splits": "num_splits"}


class Poly(Family):
    """`poly_lora_A` [N, S, I / N, R], `poly_lora_B` [N, S, R, O / N] and `poly_router.module_logits` [tasks, N S]."""

    peft_type = "POLY"
    method = "poly"
    leaves = ("poly_lora_A", "poly_lora_B", "poly_router.module_logits")
    known = frozenset({*_NAMES, "poly_type"})
    expressed = tuple(_NAMES.values())

    def why_not(self, place: Place) -> str | None:
        return None if is_linear(place) else f"PEFT has it for no {place.base.__name__}"

    def read_method(self, config: Config, place: Place, found: Tensors) -> Method:
        kind = config.get("poly_type", "poly")
        if kind != "poly":
            raise AdapterFileError(f"poly_type={kind!r} is a routing that Weft does not have: it knows 'poly'")
        defaults = {"r": 8, "n_tasks": 1, "n_skills": 4, "n_splits": 1}
        return self.made({ours: config.get(theirs, defaults[theirs]) for theirs, ours in _NAMES.items()})

    def read(self, config: Config, place: Place, found: Tensors, method: Any) -> dict[str, Tensor]:
        a, b, z = (found[leaf] for leaf in self.leaves)
        z = z.unflatten(1, (method.num_splits, method.num_skills))
        return {"A": a.mT.flatten(1, 2).unsqueeze(0), "B": b.flatten(1, 2).unsqueeze(0), "Z": z}

    def options(self, sites: Sequence[tuple[Place, Any]], places: Places) -> dict[str, Any]:
        for place, method in sites:
            if method.alpha != 1 or method.order > 1 or method.routing != "task":
                raise Unwritable(
                    f"{place.address}: PEFT's poly has the scale 1 / rank, plain factors and gates of tasks, and this "
                    f"one has alpha={method.alpha}, order={method.order}, routing={method.routing!r}"
                )
        found = dict(zip(_NAMES, uniform((m for _, m in sites), *_NAMES.values()), strict=True))
        return {**found, "poly_type": "poly", "target_modules": target_modules([p.path for p, _ in sites], places)}

    def write(self, place: Place, own: Tensors, method: Any) -> dict[str, Tensor]:
        sizes = method.num_skills, method.rank
        a, b = (own[k][0].unflatten(1, sizes) for k in "AB")  # [N, S, R, channels / N]
        return dict(zip(self.leaves, (a.mT, b, own["Z"].flatten(1)), strict=True))
