"""FourierFT, SHiRA and VeRA as PEFT stores them: few trained numbers at places or in bases that a seed decides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.adapter import AdapterFileError
from weft.core.method import Frozen, Method
from weft.interop.peft.config import Config, target_modules, uniform
from weft.interop.peft.family import NO_BIAS, Family, Tensors, is_conv1d, is_linear, transposed
from weft.interop.peft.place import Place, Places, Unwritable


class FourierFT(Family):
    """`fourierft_spectrum`; the places of its entries are drawn again from the seed."""

    peft_type = "FOURIERFT"
    method = "fourierft"
    leaves = ("fourierft_spectrum",)
    known = frozenset({"n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern"})
    neutral = NO_BIAS
    expressed = ("num_frequencies", "scaling", "location_seed")

    def why_not(self, place: Place) -> str | None:
        return None if is_linear(place) or is_conv1d(place) else f"PEFT has it for no {place.base.__name__}"

    def read_method(self, config: Config, place: Place, found: Tensors) -> Method:
        return self.made(
            {
                "num_frequencies": found["fourierft_spectrum"].numel(),
                "scaling": float(config.get("scaling", 150.0)),
                "location_seed": config.get("random_loc_seed", 777),
            }
        )

    def read(self, config: Config, place: Place, found: Tensors, method: Any) -> dict[str, Tensor]:
        return {"spectrum": found["fourierft_spectrum"], "places": method.places(place.site)}

    def options(self, sites: Sequence[tuple[Place, Any]], places: Places) -> dict[str, Any]:
        scaling, seed = uniform((m for _, m in sites), "scaling", "location_seed")
        counts = [m.num_frequencies for _, m in sites]
        common = max(set(counts), key=counts.count)
        # PEFT's pattern must follow a dot: the path without its first part, where that names one module only
        others = {
            re.escape(p.path.partition(".")[2]): m.num_frequencies for p, m in sites if m.num_frequencies != common
        }
        for p, m in sites:
            taken = next((n for key, n in sorted(others.items()) if re.match(rf".*\.{key}$", p.path)), common)
            if taken != m.num_frequencies:
                raise Unwritable(
                    f"num_frequencies={m.num_frequencies}: no n_frequency_pattern of PEFT names {p.path} only"
                )
        found = {"n_frequency": common, "scaling": scaling, "random_loc_seed": seed, **transposed(sites)}
        found |= {"n_frequency_pattern": others} if others else {}
        return found | {"target_modules": target_modules([p.path for p, _ in sites], places)}

    def write(self, place: Place, own: Tensors, method: Any) -> dict[str, Tensor]:
        if not torch.equal(own["places"].cpu().long(), method.places(place.site).cpu().long()):
            raise Unwritable(f"the places of {place.address} are not those of location_seed={method.location_seed}")
        return {"fourierft_spectrum": own["spectrum"]}


class SHiRA(Family):
    """`shira_weight` and `shira_indices` are our own, with the mask in the file."""

    peft_type = "SHIRA"
    method = "shira"
    leaves = ("shira_weight", "shira_indices")
    known = frozenset({"r", "mask_type", "random_seed"})
    expressed = ("rank",)

    def why_not(self, place: Place) -> str | None:
        return None if is_linear(place) else f"PEFT has it for no {place.base.__name__}"

    def read_method(self, config: Config, place: Place, found: Tensors) -> Method:
        if config.get("mask_type", "random") != "random":
            raise AdapterFileError(f"mask_type={config['mask_type']!r} is a mask that Weft does not have")
        return self.made({"rank": config.get("r", 32)})

    def read(self, config: Config, place: Place, found: Tensors, method: Method) -> dict[str, Tensor]:
        names = {"shira_weight": "values", "shira_indices": "indices"}
        return {names[k]: v for k, v in found.items()}

    def options(self, sites: Sequence[tuple[Place, Any]], places: Places) -> dict[str, Any]:
        (rank,) = uniform((m for _, m in sites), "rank")
        return {"r": rank, "target_modules": target_modules([p.path for p, _ in sites], places)}

    def write(self, place: Place, own: Tensors, method: Method) -> dict[str, Tensor]:
        return {"shira_weight": own["values"], "shira_indices": own["indices"].int()}


class VeRA(Family):
    """`vera_lambda_d`, `vera_lambda_b`, and once for the model `vera_A`, `vera_B`, which the seed gives when absent."""

    peft_type = "VERA"
    method = "vera"
    leaves = ("vera_lambda_d", "vera_lambda_b")
    shared = ("vera_A", "vera_B")
    known = frozenset({"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial"})
    neutral = NO_BIAS
    expressed = ("rank", "d_initial", "dropout", "projection_seed")

    def why_not(self, place: Place) -> str | None:
        return None if is_linear(place) or is_conv1d(place) else f"PEFT has it for no {place.base.__name__}"

    def read_method(self, config: Config, place: Place, found: Tensors) -> Method:
        return self.made(
            {
                "rank": config.get("r", 256),
                "d_initial": config.get("d_initial", 0.1),
                "dropout": float(config.get("vera_dropout", 0.0)),
                "projection_seed": config.get("projection_prng_key", 0),
            }
        )

    def read(self, config: Config, place: Place, found: Tensors, method: Method) -> dict[str, Tensor]:
        return {k[-1]: v for k, v in found.items()}

    def read_shared(self, config: Config, found: Tensors, sites: Mapping[str, Place], method: Any) -> dict[str, Tensor]:
        if found:
            return {k[-1]: v for k, v in found.items()}
        if config.get("save_projection", True):
            raise AdapterFileError("save_projection=True, and vera_A and vera_B are not in the file")
        drawn = method.shared([p.site for p in sites.values()])
        return {k: v.tensor if isinstance(v, Frozen) else v for k, v in drawn.items()}

    def options(self, sites: Sequence[tuple[Place, Any]], places: Places) -> dict[str, Any]:
        rank, start, dropout, seed = uniform((m for _, m in sites), *self.expressed)
        return {
            "r": rank, "d_initial": start, "vera_dropout": dropout, "projection_prng_key": seed,
            "save_projection": True, "target_modules": target_modules([p.path for p, _ in sites], places),
            **transposed(sites),
        }  # fmt: skip

    def write(self, place: Place, own: Tensors, method: Method) -> dict[str, Tensor]:
        return {f"vera_lambda_{k}": own[k] for k in "db"}

    def write_shared(self, own: Tensors) -> dict[str, Tensor]:
        return {f"vera_{k}": own[k] for k in "AB"}
