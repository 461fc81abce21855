"""LoRA and DoRA as PEFT stores them: at layers, and at bare parameters such as fused experts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.adapter import AdapterFileError
from weft.core.method import Method
from weft.core.starts import SUBTRACTED, low_rank
from weft.interop.peft.config import Config, exceptions, number, pattern_value, target_modules, uniform
from weft.interop.peft.family import NO_BIAS, Family, Tensors, convolution, is_conv1d, is_linear, transposed
from weft.interop.peft.place import Place, Places, Unwritable
from weft.kinds.experts import is_transposed

STARTS = {"gaussian": "normal", "orthogonal": "orthogonal", "pissa": "pissa", "olora": "olora"}
"""PEFT's starts that are ours too."""
LEFT_ALONE = frozenset({"true", "false", "eva"})
"""PEFT's starts that leave the base alone (from nothing, from noise, A from the inputs): over when training begins."""


class LoRA(Family):
    """`lora_A`, `lora_B`: at experts [(E R), I] and [O, (R E)]."""

    peft_type = "LORA"
    method = "lora"
    leaves: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
    known = frozenset(
        {
            "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
            "target_parameters", "ensure_weight_tying", "use_dora", "megatron_core", "qalora_group_size",
            "alora_invocation_tokens",
        }
    )  # fmt: skip
    neutral = NO_BIAS
    expressed: ClassVar[tuple[str, ...]] = ("rank", "alpha", "rank_stabilised", "dropout", "invocation_tokens")
    takes_parameters = True

    @classmethod
    def reads(cls, config: Config) -> bool:
        return super().reads(config) and not config.get("use_dora") and config.get("kasa_config") is None

    def why_not(self, place: Place) -> str | None:
        if place.offer.kind == "conv":
            return convolution(place, (1, 2, 3), grouped=False, dilated=False)
        said = getattr(place.module, "is_transposed", False)
        if place.offer.kind == "experts" and is_transposed(place.module) != said:
            return "PEFT takes the experts' inputs for their outputs where the module does not say is_transposed"
        if place.is_parameter or is_linear(place) or is_conv1d(place) or place.offer.kind == "embedding":
            return None
        return f"PEFT has it for no {place.base.__name__}"

    def read_method(self, config: Config, place: Place, found: Tensors) -> Method:
        first = next((found[k] for k in ("lora_A.weight", "lora_embedding_A") if k in found), None)
        rank = config.get("r", 8) if first is None else len(first) // (place.site.experts or 1)
        name = place.address if place.is_parameter else place.path
        return self.made(
            {
                "rank": rank,
                "alpha": float(pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))),
                "rank_stabilised": bool(config.get("use_rslora")),
                "dropout": float(config.get("lora_dropout", 0.0)),
                **self.start(config),
                **self.invocation(config),
            }
        )

    def invocation(self, config: Config) -> dict[str, Any]:
        """From which tokens on it applies (PEFT's activated LoRA)."""
        tokens = config.get("alora_invocation_tokens")
        return {"invocation_tokens": tuple(tokens)} if tokens else {}

    def start(self, config: Config) -> dict[str, Any]:
        """How the adapter began: it matters where it edited the base, which here it does not."""
        value = config.get("init_lora_weights", True)
        if isinstance(value, bool) or str(value).lower() in LEFT_ALONE:
            return {}
        if value not in STARTS:
            raise AdapterFileError(
                f"init_lora_weights={value!r} is a start that Weft does not have or cannot repeat. If it left the "
                "base's weights alone, set it to true in adapter_config.json; if it edited them, save the adapter "
                "again with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        return {"start": STARTS[value]}

    def read(self, config: Config, place: Place, found: Tensors, method: Any) -> dict[str, Tensor]:
        site = place.site
        names = self.leaves[2:4] if site.kind == "embedding" else self.leaves[:2]
        t = {ours: found[theirs] for ours, theirs in zip("AB", names, strict=True) if theirs in found}
        extra = sorted(found.keys() - {*names, "lora_magnitude_vector"})
        if extra:
            raise AdapterFileError(f"it is a {place.base.__name__} and has {', '.join(extra)}")
        if site.kind == "experts":
            e = site.experts or 1
            _check_version(config)
            if "A" in t:
                t["A"] = t["A"].unflatten(0, (e, -1))  # [E, R, I]
            if "B" in t:
                t["B"] = t["B"].unflatten(1, (-1, e)).permute(2, 0, 1)  # [E, O, R]
        elif site.kind == "conv" and "B" in t:
            t["B"] = t["B"].flatten(1)
        if getattr(method, "start", None) in SUBTRACTED and t.keys() == {"A", "B"}:
            t = self._subtracted(config, place, t, method)
        return {k: v.contiguous() for k, v in t.items()}

    def _subtracted(self, config: Config, place: Place, t: Mapping[str, Tensor], method: Any) -> dict[str, Tensor]:
        """The start as tensors of its own: the second half of a converted adapter, or computed anew from the base."""
        if "start" not in self.start(config):
            (a, a0), (b, b0) = t["A"].chunk(2, dim=-2 if place.site.kind == "experts" else 0), t["B"].chunk(2, dim=-1)
            return {"A": a, "B": b, "A0": a0, "B0": -b0}
        if place.offer.kind != "linear" or place.is_parameter or (method.start == "olora" and not is_linear(place)):
            raise AdapterFileError(
                f"init_lora_weights={config['init_lora_weights']!r} at a {place.base.__name__} is not "
                "repeatable; save the adapter again with PEFT's path_initial_model_for_weight_conversion"
            )
        a0, b0 = low_rank(method.start, place.site, place.seat.start(), rank=method.rank, scale=method.scale)
        return {**t, "A0": a0, "B0": b0}

    def options(self, sites: Sequence[tuple[Place, Any]], places: Places) -> dict[str, Any]:
        stabilised, dropout = uniform((m for _, m in sites), "rank_stabilised", "dropout")
        tokens = self.tokens(sites)
        if dropout and any(p.is_parameter for p, _ in sites):
            raise Unwritable(f"dropout={dropout}: PEFT has no dropout at bare parameters such as fused experts")
        names = {id(p): p.address if p.is_parameter else p.path for p, _ in sites}
        rank, ranks = exceptions({names[id(p)]: m.rank * _doubled(m) for p, m in sites})
        alpha, alphas = exceptions({names[id(p)]: number(_alpha(m)) for p, m in sites})
        found = {
            "r": rank, "rank_pattern": ranks, "lora_alpha": alpha, "alpha_pattern": alphas, "use_rslora": stabilised,
            "lora_dropout": dropout, "alora_invocation_tokens": tokens, **transposed(sites),
        }  # fmt: skip
        modules = [p.path for p, _ in sites if not p.is_parameter]
        found["target_modules"] = target_modules(modules, places)
        found["target_parameters"] = sorted(p.address for p, _ in sites if p.is_parameter)
        starts = {getattr(m, "start", "kaiming") for _, m in sites}
        if len(starts) == 1 and starts < {"normal", "orthogonal"} and all(is_linear(p) for p, _ in sites):
            found["init_lora_weights"] = "gaussian" if starts == {"normal"} else "orthogonal"
        return {k: v for k, v in found.items() if v or k in ("r", "lora_alpha", "target_modules")}

    def tokens(self, sites: Sequence[tuple[Place, Any]]) -> list[int]:
        """The tokens from which on all these sites apply, if any."""
        (tokens,) = uniform((m for _, m in sites), "invocation_tokens")
        for place, _ in sites:
            if tokens and (place.is_parameter or place.offer.kind != "linear"):
                raise Unwritable(f"invocation_tokens: PEFT has them at linear layers only, and {place.path} is none")
        return [*tokens]

    def write(self, place: Place, own: Tensors, method: Any) -> dict[str, Tensor]:
        a, b = own["A"], own["B"]
        if "A0" in own:  # one update of twice the rank on the base as it is: W + s (B A - B0 A0)
            a = torch.cat([a, own["A0"]], dim=1 if place.site.kind == "experts" else 0)
            b = torch.cat([b, -own["B0"]], dim=-1)
        if place.site.kind == "embedding":
            return {"lora_embedding_A": a, "lora_embedding_B": b}
        if place.site.kind == "experts":
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)  # [(E R), I], [O, (R E)]
        elif place.site.kind == "conv":
            b = b.view(*b.shape, *[1] * len(place.site.kernel_size))
        return {"lora_A.weight": a, "lora_B.weight": b}

    def agrees(self, said: Any, derived: Any) -> str | None:
        if getattr(said, "start", None) in SUBTRACTED and derived.start not in SUBTRACTED:
            whole = derived.rank == 2 * said.rank and abs(derived.alpha - _alpha(said)) < 1e-6 * derived.alpha
            return None if whole and said.rank_stabilised == derived.rank_stabilised else "rank or alpha"
        return super().agrees(said, derived)


class DoRA(LoRA):
    """LoRA's tensors and `lora_magnitude_vector`, at a convolution [1, O, 1, ...]."""

    method = "dora"
    leaves = (*LoRA.leaves, "lora_magnitude_vector")
    expressed = ("rank", "alpha", "rank_stabilised", "dropout")
    takes_parameters = False

    @classmethod
    def reads(cls, config: Config) -> bool:
        return config["peft_type"].upper() == "LORA" and bool(config.get("use_dora"))

    def start(self, config: Config) -> dict[str, Any]:
        if super().start(config).get("start") in SUBTRACTED:
            raise AdapterFileError(
                f"init_lora_weights={config['init_lora_weights']!r} with use_dora=True edits the base, which Weft's "
                "DoRA does not do; save the adapter again with PEFT's path_initial_model_for_weight_conversion"
            )
        return {}

    def invocation(self, config: Config) -> dict[str, Any]:
        if config.get("alora_invocation_tokens"):
            raise AdapterFileError("alora_invocation_tokens with use_dora=True: Weft's DoRA applies to all tokens")
        return {}

    def tokens(self, sites: Sequence[tuple[Place, Any]]) -> list[int]:
        return []

    def read(self, config: Config, place: Place, found: Tensors, method: Any) -> dict[str, Tensor]:
        t = super().read(config, place, found, method)
        if "lora_magnitude_vector" in found:
            t["magnitude"] = found["lora_magnitude_vector"].flatten()
        return t

    def options(self, sites: Sequence[tuple[Place, Any]], places: Places) -> dict[str, Any]:
        return {**super().options(sites, places), "use_dora": True}

    def write(self, place: Place, own: Tensors, method: Any) -> dict[str, Tensor]:
        m = own["magnitude"]
        if place.site.kind == "conv":
            m = m.view(1, -1, *[1] * len(place.site.kernel_size))
        return {**super().write(place, own, method), "lora_magnitude_vector": m}


def _check_version(config: Config) -> None:
    """AdapterFileError for experts in the layout that PEFT had before 0.19, which no tensor's shape tells apart."""
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version")))
    if version is None or (int(version[1]), int(version[2])) < (0, 19):
        raise AdapterFileError(
            f"peft_version={config.get('peft_version')!r} with target_parameters={config.get('target_parameters')!r}: "
            "PEFT stored experts in another order before 0.19; train the adapter again with a later one"
        )


def _doubled(method: Any) -> int:
    return 2 if getattr(method, "start", None) in SUBTRACTED else 1


def _alpha(method: Any) -> float:
    """The alpha that keeps the scale when the rank is doubled."""
    times = _doubled(method)
    return method.alpha * (times**0.5 if method.rank_stabilised else times)
