"""FRoD as PEFT stores it: scales and rotations in a basis that the weights of a role share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.adapter import AdapterFileError
from weft.core.joint import in_basis
from weft.core.method import Method
from weft.interop.peft.blocks import no_linear
from weft.interop.peft.config import Config, target_modules, uniform
from weft.interop.peft.family import NO_BIAS, Family, Tensors, transposed
from weft.interop.peft.place import Place, Places, Unwritable


class FRoD(Family):
    """`frod_lambda_l` (the scales themselves) and `frod_lambda_s_values`; `frod_V`, `frod_s_indices` for each role."""

    peft_type = "FROD"
    method = "frod"
    leaves = ("frod_lambda_l", "frod_lambda_s_values")
    known = frozenset(
        {
            "sparse_rate", "regularization_alpha", "frod_dropout", "projection_prng_key", "save_projection",
            "progressbar", "runtime_offload_base_weight",
        }
    )  # fmt: skip
    neutral = NO_BIAS
    expressed = ("sparse_rate", "ridge", "dropout", "places_seed")
    shared = ("frod_V", "frod_s_indices", "frod_s_size")
    renames = False

    def __init__(self) -> None:
        self._scales: dict[str, tuple[Place, dict[str, Tensor]]] = {}
        self._roles: dict[str, str] = {}

    def shares(self, key: str) -> bool:
        return key.partition(".")[0] in self.shared

    def why_not(self, place: Place) -> str | None:
        return no_linear(place, conv1d=True)

    def read_method(self, config: Config, place: Place, found: Tensors) -> Method:
        return self.made(
            {
                "sparse_rate": float(config.get("sparse_rate", 0.01)),
                "ridge": float(config.get("regularization_alpha", 1e-3)),
                "dropout": float(config.get("frod_dropout", 0.0)),
                "places_seed": config.get("projection_prng_key", 0),
            }
        )

    def read(self, config: Config, place: Place, found: Tensors, method: Method) -> dict[str, Tensor]:
        own = {"d": found["frod_lambda_l"], "s": found["frod_lambda_s_values"]}
        self._scales[place.address] = place, own
        return own

    def read_shared(self, config: Config, found: Tensors, sites: Mapping[str, Place], method: Any) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for address, (place, own) in self._scales.items():
            category, role = _category(place.path), method.role(place.site)
            if f"frod_V.{category}" not in found or f"frod_s_indices.{category}" not in found:
                raise AdapterFileError(
                    f"{address}: its basis, frod_V.{category}, is not in the file, and nobody can make the very same "
                    "one again; save the adapter with save_projection=True"
                )
            if f"V{role}" not in made:
                v = made[f"V{role}"] = found[f"frod_V.{category}"]
                made[f"V_inverse{role}"] = torch.linalg.pinv(v.double()).to(v.dtype)
                made[f"places{role}"] = found[f"frod_s_indices.{category}"]
            own["d"] = own["d"] - self._present(place, made[f"V_inverse{role}"].to(own["d"].dtype))
        return made

    def _present(self, place: Place, inverse: Tensor) -> Tensor:
        """The scales of a weight in the basis, all of them above zero."""
        scales = in_basis(place.weight.to("cpu"), inverse.to("cpu"))[1]
        if not scales.all():
            raise AdapterFileError(
                f"{place.address} has nothing of {int((scales == 0).sum())} directions of its basis, where PEFT trains "
                "on rounding errors of the weight: there are too few layers of its role for FRoD"
            )
        return scales

    def options(self, sites: Sequence[tuple[Place, Any]], places: Places) -> dict[str, Any]:
        rate, ridge, dropout, seed = uniform((m for _, m in sites), *self.expressed)
        for place, method in sites:
            category = _category(place.path)
            if self._roles.setdefault(category, method.role(place.site)) != method.role(place.site):
                raise Unwritable(f"PEFT has one basis for all that it calls {category}, and here there are several")
        return {
            "sparse_rate": rate, "regularization_alpha": ridge, "frod_dropout": dropout, "projection_prng_key": seed,
            "save_projection": True, "target_modules": target_modules([p.path for p, _ in sites], places),
            **transposed(sites),
        }  # fmt: skip

    def write(self, place: Place, own: Tensors, method: Any) -> dict[str, Tensor]:
        role, d = method.role(place.site), own["d"]
        scales = in_basis(place.weight.to(d), own[f"V_inverse{role}"])[1]
        kept = scales[own[f"places{role}"][0]] > 0  # elsewhere it changes nothing here, and rounding errors in PEFT
        scales, mixed = torch.where(scales > 0, scales + d, 0), torch.where(kept, own["s"], 0)
        return {"frod_lambda_l": scales, "frod_lambda_s_values": mixed}

    def write_shared(self, own: Tensors) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for category, role in self._roles.items():
            v = own[f"V{role}"]
            found[f"frod_V.{category}"] = v
            found[f"frod_s_indices.{category}"] = own[f"places{role}"]
            found[f"frod_s_size.{category}"] = torch.tensor(v.shape)
        return found


def _category(path: str) -> str:
    """PEFT's name of a module's role."""
    parts = path.split(".")
    if len(parts) > 2 and parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return "_".join(parts[-2:]) if len(parts) > 1 and not parts[-2].isdigit() else parts[-1]
