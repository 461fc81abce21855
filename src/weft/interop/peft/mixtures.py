"""PEFT's X-LoRA folders: the classifier, and LoRAs that lie in folders of their own. They are read, and not written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from weft.adapter import CONFIG, AdapterFileError, Stored, read_info, read_tensors
from weft.core.method import Method
from weft.core.router import Expert, Router
from weft.interop.peft.config import Config, check_options
from weft.interop.peft.place import Place, Places
from weft.interop.peft.reading import from_peft
from weft.registry import method_class, method_from_spec

__all__ = ["NOT_WRITTEN", "PEFT_TYPE", "read_mixture"]

PEFT_TYPE = "XLORA"
NOT_WRITTEN = (
    "PEFT's X-LoRA is no folder but several: each expert lies in one of its own, which the configuration names by the "
    "path on the machine where it was made; save the experts as PEFT folders, and the router with format='weft'"
)
_KNOWN = frozenset(
    {
        "hidden_size", "adapters", "enable_softmax", "enable_softmax_topk", "softmax_temperature",
        "layerwise_scalings", "top_k_lora", "xlora_depth", "xlora_size", "xlora_dropout_p", "use_trainable_adapters",
        "global_scaling_weight",
    }
)  # fmt: skip
_MAP = re.compile(r"base_model\.internal_xlora_classifier\.layers\.(\d+)\.(weight|bias)")


def read_mixture(model: nn.Module, folder: Path, tensors: Mapping[str, Tensor], config: Config) -> Stored:
    """What an X-LoRA folder holds, in Weft's own terms: a router over the LoRAs that it names."""
    check_options(config, _KNOWN, {}, folder)
    stored = {name: _expert(model, sub) for name, sub in _folders(config, folder).items()}
    places = _places(model, stored, folder)
    router = _router(config, folder)
    methods, found = {}, {}
    for index, address in enumerate(places):
        own = {n: s for n, s in stored.items() if address in s.sites}
        methods[address] = router.over(tuple(Expert(n, _method(s, address)) for n, s in own.items()))
        found[address] = {f"{n}:{key}": t for n, s in own.items() for key, t in s.tensors[address].items()}
        found[address] |= methods[address].own_row(index)  # type: ignore[attr-defined]
    whole = router.over(tuple(Expert(n, s.method) for n, s in stored.items()))
    sites = {a: {"method": m.spec()} if m != whole else {} for a, m in methods.items()}
    shared = {router.name: _classifier(config, tensors, [*stored], folder)}
    return Stored(whole, sites, found, shared, {})


def _folders(config: Config, folder: Path) -> dict[str, Path]:
    """The experts' folders, in the order of the classifier's scores."""
    named = dict(config.get("adapters") or {})
    order = [str(k) for k in range(len(named))]
    if not named or named.keys() != {*order}:
        raise AdapterFileError(
            f"{folder / CONFIG}: adapters are named {', '.join(named) or 'nowhere'}, and PEFT's X-LoRA uses its "
            "experts by the names 0, 1, ... alone: name them so, in the order of the classifier's scores"
        )
    found = {name: folder / str(named[name]) for name in order}
    for name, place in found.items():
        if not place.resolve().is_relative_to(folder.resolve()) or not (place / CONFIG).is_file():
            raise AdapterFileError(
                f"{folder / CONFIG} names expert {name} by the path {named[name]!r}, where this folder holds no "
                f"adapter: copy the expert's folder into {folder} and write its relative path into {CONFIG}"
            )
    return found


def _expert(model: nn.Module, folder: Path) -> Stored:
    stored = from_peft(model, folder, read_tensors(folder), read_info(folder))
    names = {_method(stored, address).name for address in stored.sites}
    if names != {"lora"}:
        raise AdapterFileError(
            f"{folder} is {', '.join(sorted(names))}, and the experts of PEFT's X-LoRA are plain LoRAs"
        )
    return stored


def _method(stored: Stored, address: str) -> Method:
    entry = stored.sites[address]
    return method_from_spec(entry["method"]) if "method" in entry else stored.method


def _places(model: nn.Module, stored: Mapping[str, Stored], folder: Path) -> dict[str, Place]:
    """Every map that some expert adapts, in the model's order, which is that of layerwise scores."""
    places = Places(model)
    found: dict[str, Place] = {}
    for address in dict.fromkeys(a for s in stored.values() for a in s.sites):
        place = places.map_at(address)
        if place is None or place.offer.kind != "linear":
            raise AdapterFileError(
                f"{folder}: an expert adapts {address}, and Weft's xlora weighs LoRAs of linear maps"
            )
        found[address] = place
    return dict(sorted(found.items(), key=lambda item: places.order(item[1])))


def _router(config: Config, folder: Path) -> Router:
    """Our router with PEFT's options, over no experts yet."""
    every, chosen, k = config.get("enable_softmax", True), config.get("enable_softmax_topk"), config.get("top_k_lora")
    if every and chosen:
        raise AdapterFileError(
            f"{folder / CONFIG}: enable_softmax and enable_softmax_topk are both true, a softmax of a softmax that "
            "Weft does not have"
        )
    options = {
        "softmax": "chosen" if chosen and k else "all" if every or chosen else "none",
        # PEFT's softmax over the chosen has no temperature
        "temperature": 1.0 if chosen else float(config.get("softmax_temperature", 1.0)),
        "k": k, "layerwise": bool(config.get("layerwise_scalings")), "depth": config.get("xlora_depth", 1),
        "width": config.get("xlora_size", 2048), "dropout": float(config.get("xlora_dropout_p", 0.2)),
        "hidden_size": config.get("hidden_size"), "scale": float(config.get("global_scaling_weight", 1.0)),
        "train_experts": bool(config.get("use_trainable_adapters")),
    }  # fmt: skip
    try:
        router = method_class("xlora")(**options)
    except (ValueError, TypeError) as error:
        raise AdapterFileError(f"{folder / CONFIG}: {error}") from error
    assert isinstance(router, Router), "it is one"
    return router


def _classifier(config: Config, tensors: Mapping[str, Tensor], names: list[str], folder: Path) -> dict[str, Tensor]:
    """The network's maps by our names: of the last one a row for every expert (and every site)."""
    unknown = sorted(key for key in tensors if not _MAP.fullmatch(key))
    if unknown:
        raise AdapterFileError(f"{folder} has {', '.join(unknown[:3])}, which is no part of an X-LoRA classifier")
    depth, step = config.get("xlora_depth", 1), 3 if config.get("xlora_dropout_p", 0.2) > 0 else 2
    prefix = "base_model.internal_xlora_classifier.layers."
    keys = [[f"{prefix}{i * step}.{part}" for part in ("weight", "bias")] for i in range(depth)]
    missing = sorted({key for pair in keys for key in pair} - tensors.keys())
    if missing:
        raise AdapterFileError(
            f"{folder} lacks {', '.join(missing)}: PEFT 0.21 leaves those layers of the classifier out of the file "
            "whose number is also an expert's name; save model.base_model.internal_xlora_classifier.state_dict() under "
            "these names, or save with a PEFT that kept them (0.17)"
        )
    maps = [(tensors[weight], tensors[bias]) for weight, bias in keys]
    found: dict[str, Tensor] = {}
    for i, (weight, bias) in enumerate(maps[:-1]):
        found |= {f"M_{i}": weight, f"bM_{i}": bias}
    weight, bias = maps[-1]
    if len(weight) % len(names):
        raise AdapterFileError(f"{folder}: a classifier of {len(weight)} scores does not fit {len(names)} experts")
    for k, name in enumerate(names):
        found |= {f"W_{name}": weight[k :: len(names)], f"bW_{name}": bias[k :: len(names)]}
    return {key: t.contiguous() for key, t in found.items()}
