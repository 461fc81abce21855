"""LoHa and LoKr as PEFT stores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from weft.core.method import Method
from weft.interop.peft.config import Config, exceptions, number, pattern_value, target_modules, uniform
from weft.interop.peft.family import Family, Tensors, convolution, is_linear
from weft.interop.peft.place import Place, Places

_LOHA = {f"hada_w{n}_{theirs}": f"w{n}_{ours}" for n in (1, 2) for theirs, ours in (("a", "b"), ("b", "a"))}
_LOHA |= {"hada_t1": "t1", "hada_t2": "t2"}
_LOKR = {f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}


class _Product(Family):
    """Options that both have; `names` maps PEFT's tensors to ours."""

    names: ClassVar[Mapping[str, str]]

    def why_not(self, place: Place) -> str | None:
        if place.offer.kind == "conv":
            return convolution(place, (1, 2), grouped=True, dilated=True)
        return None if is_linear(place) else f"PEFT has it for no {place.base.__name__}"

    def read_method(self, config: Config, place: Place, found: Tensors) -> Method:
        return self.made(
            {
                "rank": pattern_value(config.get("rank_pattern"), place.path, config.get("r", 8)),
                "alpha": float(pattern_value(config.get("alpha_pattern"), place.path, config.get("alpha", 8))),
                "effective_conv": bool(config.get("use_effective_conv2d")),
                **self.own_options(config),
            }
        )

    def own_options(self, config: Config) -> dict[str, Any]:
        """What only this method has."""
        return {}

    def read(self, config: Config, place: Place, found: Tensors, method: Method) -> dict[str, Tensor]:
        return {self.names[k]: v for k, v in found.items()}

    def options(self, sites: Sequence[tuple[Place, Any]], places: Places) -> dict[str, Any]:
        (effective,) = uniform((m for _, m in sites), "effective_conv")
        rank, ranks = exceptions({p.path: m.rank for p, m in sites})
        alpha, alphas = exceptions({p.path: number(m.alpha) for p, m in sites})
        found = {"r": rank, "alpha": alpha, "target_modules": target_modules([p.path for p, _ in sites], places)}
        off = {"rank_pattern": ranks, "alpha_pattern": alphas, "use_effective_conv2d": effective}
        return found | {k: v for k, v in off.items() if v}

    def write(self, place: Place, own: Tensors, method: Method) -> dict[str, Tensor]:
        return {theirs: own[ours] for theirs, ours in self.names.items() if ours in own}


class LoHa(_Product):
    """PEFT calls the left factors a and the right ones b."""

    peft_type = "LOHA"
    method = "loha"
    names = _LOHA
    leaves = tuple(_LOHA)
    known = frozenset({"r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d"})
    expressed = ("rank", "alpha", "effective_conv")


class LoKr(_Product):
    """The tensors are our own."""

    peft_type = "LOKR"
    method = "lokr"
    names = _LOKR
    leaves = tuple(_LOKR)
    known = LoHa.known | {"decompose_both", "decompose_factor"}
    expressed = (*LoHa.expressed, "decompose_both", "decompose_factor")

    def own_options(self, config: Config) -> dict[str, Any]:
        factor = config.get("decompose_factor", -1)
        return {
            "decompose_both": bool(config.get("decompose_both")),
            "decompose_factor": None if factor == -1 else factor,
        }

    def options(self, sites: Sequence[tuple[Place, Any]], places: Places) -> dict[str, Any]:
        both, factor = uniform((m for _, m in sites), "decompose_both", "decompose_factor")
        found = super().options(sites, places) | ({"decompose_both": True} if both else {})
        return found | ({} if factor is None else {"decompose_factor": factor})
