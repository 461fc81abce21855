"""OFT, BOFT and RoAd as PEFT stores them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from weft.adapter import AdapterFileError
from weft.core.method import Method
from weft.interop.peft.config import Config, target_modules, uniform
from weft.interop.peft.family import NO_BIAS, Family, Tensors, convolution, is_linear
from weft.interop.peft.place import Place, Places


class OFT(Family):
    """`oft_R.weight` (`oft_embedding_R.weight` at an embedding): upper triangles of skew blocks."""

    peft_type = "OFT"
    method = "oft"
    leaves = ("oft_R.weight", "oft_embedding_R.weight")
    known = frozenset(
        {"r", "oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"}
    )
    neutral = NO_BIAS
    expressed = ("block_size", "neumann_terms", "constrained", "eps", "block_share")

    def why_not(self, place: Place) -> str | None:
        if place.offer.kind == "conv":
            if any(size > 1 for size in place.site.kernel_size):
                return (
                    "PEFT adds overlapping patches up at a convolution, so that it runs something else than it merges"
                )
            return convolution(place, (2,), grouped=False, dilated=False)
        if is_linear(place) or place.offer.kind == "embedding":
            return None
        return f"PEFT has it for no {place.base.__name__}"

    def read_method(self, config: Config, place: Place, found: Tensors) -> Method:
        first = next(iter(found.values()))
        block = (1 + math.isqrt(1 + 8 * first.shape[-1])) // 2  # numbers in the triangle -> side
        exact = not config.get("use_cayley_neumann", True)
        return self.made(
            {
                "block_size": block,
                "neumann_terms": None if exact else config.get("num_cayley_neumann_terms", 5),
                "constrained": bool(config.get("coft")),
                "eps": config.get("eps", 6e-5),
                "block_share": bool(config.get("block_share")),
            }
        )

    def read(self, config: Config, place: Place, found: Tensors, method: Method) -> dict[str, Tensor]:
        leaf = _oft_leaf(place)
        return {("weight" if k == leaf else k): v for k, v in found.items()}

    def options(self, sites: Sequence[tuple[Place, Any]], places: Places) -> dict[str, Any]:
        block, terms, coft, eps, share = uniform((m for _, m in sites), *self.expressed)
        found = {"oft_block_size": block, "r": 0, "target_modules": target_modules([p.path for p, _ in sites], places)}
        found |= {"use_cayley_neumann": False} if terms is None else {"num_cayley_neumann_terms": terms}
        found |= {"coft": True, "eps": eps} if coft else {}
        return found | ({"block_share": True} if share else {})

    def write(self, place: Place, own: Tensors, method: Method) -> dict[str, Tensor]:
        return {_oft_leaf(place): own["weight"]}

    def agrees(self, said: Any, derived: Any) -> str | None:
        differing = super().agrees(said, derived)
        return None if differing == "eps" and not said.constrained else differing


class BOFT(Family):
    """`boft_R` [m, N, block, block] and `boft_s`, a column at a linear layer and a row at a convolution."""

    peft_type = "BOFT"
    method = "boft"
    leaves = ("boft_R", "boft_s")
    known = frozenset({"boft_block_size", "boft_block_num", "boft_n_butterfly_factor"})
    neutral = NO_BIAS
    expressed = ("block_size", "factors")

    def why_not(self, place: Place) -> str | None:
        if place.offer.kind == "conv":
            return convolution(place, (2,), grouped=False, dilated=False)
        return None if is_linear(place) else f"PEFT has it for no {place.base.__name__}"

    def read_method(self, config: Config, place: Place, found: Tensors) -> Method:
        if "boft_R" not in found or found["boft_R"].ndim != 4:
            raise AdapterFileError("it lacks boft_R [factors, blocks, size, size]")
        factors, _, block, _ = found["boft_R"].shape
        return self.made({"block_size": block, "factors": factors})

    def read(self, config: Config, place: Place, found: Tensors, method: Method) -> dict[str, Tensor]:
        names = {"boft_R": "A", "boft_s": "s"}
        return {names[k]: v.flatten() if k == "boft_s" else v for k, v in found.items()}

    def options(self, sites: Sequence[tuple[Place, Any]], places: Places) -> dict[str, Any]:
        block, factors = uniform((m for _, m in sites), *self.expressed)
        found = {"boft_block_size": block, "boft_block_num": 0, "boft_n_butterfly_factor": factors}
        return {**found, "target_modules": target_modules([p.path for p, _ in sites], places)}

    def write(self, place: Place, own: Tensors, method: Method) -> dict[str, Tensor]:
        return {"boft_R": own["A"], "boft_s": own["s"].view((1, -1) if place.offer.kind == "conv" else (-1, 1))}


class RoAd(Family):
    """`road_theta` and `road_alpha` are our own."""

    peft_type = "ROAD"
    method = "road"
    leaves = ("road_theta", "road_alpha")
    known = frozenset({"variant", "group_size"})
    expressed = ("variant", "group_size")

    def why_not(self, place: Place) -> str | None:
        return None if is_linear(place) else f"PEFT has it for no {place.base.__name__}"

    def read_method(self, config: Config, place: Place, found: Tensors) -> Method:
        variant = str(config.get("variant", "road_1"))
        if variant not in ("road_1", "road_2", "road_4"):
            raise AdapterFileError(f"variant={variant!r} is a RoAd that Weft does not have")
        return self.made({"variant": int(variant[-1]), "group_size": config.get("group_size", 64)})

    def read(self, config: Config, place: Place, found: Tensors, method: Method) -> dict[str, Tensor]:
        return {k.removeprefix("road_"): v for k, v in found.items()}

    def options(self, sites: Sequence[tuple[Place, Any]], places: Places) -> dict[str, Any]:
        variant, size = uniform((m for _, m in sites), *self.expressed)
        targets = target_modules([p.path for p, _ in sites], places)
        return {"variant": f"road_{variant}", "group_size": size, "target_modules": targets}

    def write(self, place: Place, own: Tensors, method: Method) -> dict[str, Tensor]:
        return {f"road_{k}": own[k] for k in ("theta", "alpha")}


def _oft_leaf(place: Place) -> str:
    return "oft_embedding_R.weight" if place.offer.kind == "embedding" else "oft_R.weight"
