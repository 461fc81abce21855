"""From PEFT's configuration and tensors to Weft's: which site, which method, which tensor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from weft.adapter import CONFIG, AdapterFileError, Stored
from weft.core.method import Method
from weft.errors import nearest
from weft.interop.peft.config import check_options, read_config
from weft.interop.peft.family import FAMILIES, Family
from weft.interop.peft.heads import drop_mirrored, followers, read_heads
from weft.interop.peft.place import Place, Places, ends_of
from weft.interop.peft.tokens import EMBEDDINGS, Whole
from weft.registry import method_class, method_from_spec

Found = dict[str, tuple[Place, dict[str, Tensor]]]
"""Tensors by address, with the place."""


def from_peft(model: nn.Module, folder: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None) -> Stored:
    """What a PEFT folder holds, in Weft's own terms."""
    config = read_config(folder)
    family = _family(config, folder)
    check_options(config, family.known, family.neutral, folder)
    places = Places(model)
    said = _said(info, folder)
    parts = _Parts(family, places, config, folder)
    parts.sort(tensors)
    found, methods = parts.sites(said)
    default = _default(family, said, methods)
    _check_targets(config, found, places, folder)
    shared = family.read_shared(config, parts.shared, {a: p for a, (p, _) in found.items()}, default)
    heads = read_heads(parts.rest, config, places, _edited(found, methods), folder)
    for address, (place, own) in heads.items():
        if info is None or address in said or not _untrained(place, own):
            found[address], methods[address] = (place, own), method_class("full")()
    tied = drop_mirrored(found, places, folder, said) if config.get("ensure_weight_tying") else "separate"
    order = [*said] if info is not None else sorted(found, key=lambda a: places.order(found[a][0]))
    sites: dict[str, dict[str, Any]] = {}
    for address in filter(None, order):
        entry = dict((info or {"sites": {}})["sites"].get(address, {}))
        method = methods.get(address, default)
        if method is not default and method != default:
            entry["method"] = method.spec()
        sites[address] = entry
    unexpected = sorted(found.keys() - sites.keys())
    if unexpected:
        raise AdapterFileError(f"{folder} has tensors for {', '.join(unexpected[:3])}, which weft.json does not name")
    return Stored(
        default,
        sites,
        {a: t for a, (_, t) in found.items()},
        {family.method: shared} if shared else {},
        (info or {}).get("base", {}),
        (info or {}).get("targets", config.get("target_modules")),
        (info or {}).get("tied", tied),
    )


class _Parts:
    """The tensors of a file, sorted into those of a module, those of the whole model, and the rest."""

    def __init__(self, family: Family, places: Places, config: Mapping[str, Any], folder: Path):
        self.family, self.places, self.config, self.folder = family, places, config, folder
        self.modules: dict[str, dict[str, Tensor]] = {}
        self.shared: dict[str, Tensor] = {}
        self.rest: dict[str, Tensor] = {}

    def sort(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the prefix off every key, and the method's own leaf."""
        prefix = "base_model." if isinstance(self.family, Whole) else "base_model.model."
        for key, value in tensors.items():
            name = key.removeprefix(prefix)
            leaf = next((leaf for leaf in self.family.leaves if name == leaf or name.endswith(f".{leaf}")), None)
            if self.family.shares(key.removeprefix("base_model.")):
                self.shared[key.removeprefix("base_model.")] = value
            elif leaf is not None:
                self.modules.setdefault(name[: -len(leaf)].rstrip("."), {})[leaf] = value
            else:
                self.rest[name] = value
        for path in self.family.without_tensors(self.config, self.places):
            self.modules.setdefault(path, {})
        if not self.modules:
            expected = ", ".join(self.family.leaves)
            raise AdapterFileError(f"{self.folder} has none of the tensors of {self.config['peft_type']} ({expected})")

    def sites(self, said: Mapping[str, Method]) -> tuple[Found, dict[str, Method]]:
        """Our tensors and methods by address."""
        found: Found = {}
        methods: dict[str, Method] = {}
        if isinstance(self.family, Whole):
            matrix = self.modules[""][EMBEDDINGS]
            beside = self.family.beside(self.config, self.modules[""])
            derived = self.family.read_method(self.config, None, {})  # type: ignore[arg-type]  # reads no site
            known = said.get("")
            if (
                known is not None
                and known.name == derived.name
                and self.family.agrees(known, derived) is None
                and not getattr(known, "projection", False)
            ):
                derived = known
            for address, own in self.family.split(self.config, self.places, matrix).items():
                place = next(p for k in ("input", "attention") for p in self.places.of_kind(k) if p.address == address)
                found[address], methods[address] = (place, {**own, **beside}), derived
            return found, methods
        for path, own in self.modules.items():
            place = self._place(path)
            reason = self.family.why_not(place)
            if reason is not None:
                raise AdapterFileError(f"{self.folder} adapts {place.address}, and {reason}")
            try:
                derived = self.family.read_method(self.config, place, own)
                method = self._agreed(said.get(place.address), derived, place)
                found[place.address] = (place, self.family.read(self.config, place, own, method))
            except (
                ValueError,
                TypeError,
                KeyError,
                IndexError,
                RuntimeError,
            ) as error:  # values or shapes that fit nothing
                what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                raise AdapterFileError(f"{self.folder}: {place.address}: {what}") from error
            methods[place.address] = method
        return found, methods

    def _agreed(self, said: Method | None, derived: Method, place: Place) -> Method:
        """The method of weft.json, which may say more, where both say the same."""
        if said is None:
            return derived
        differing = "the method" if said.name != derived.name else self.family.agrees(said, derived)
        if differing is not None:
            raise AdapterFileError(
                f"weft.json and {CONFIG} differ about {differing} ({said} and "
                f"{derived}); delete weft.json if the other one is right"
            )
        return said

    def _place(self, path: str) -> Place:
        """The place that PEFT's path means: a module, or the nth parameter of one, counted from the innermost."""
        root = re.sub(r"(\.base_layer)+$", "", path)
        own = self.family.place_at(self.places, root)
        if own is not None and root == path:
            return own
        named = self.config.get("target_parameters") or ()
        each = [p for p in self.places.parameters_at(root) if any(f".{p.address}".endswith(f".{t}") for t in named)]
        depth = path[len(root) :].count(".base_layer")
        if depth >= len(each):
            raise self.places.unknown(root, self.folder)
        return each[len(each) - 1 - depth]


def _family(config: Mapping[str, Any], folder: Path) -> Family:
    for cls in FAMILIES:
        if cls.reads(config):
            return cls()
    known = {f.peft_type for f in FAMILIES}
    kind = config["peft_type"]
    raise AdapterFileError(
        f"{folder / CONFIG}: peft_type={kind!r} is a method that Weft does not have; {nearest(kind, known)}"
    )


def _said(info: Mapping[str, Any] | None, folder: Path) -> dict[str, Method]:
    """The methods that weft.json names, by address; under "" the adapter's own."""
    if info is None:
        return {}
    try:
        default = method_from_spec(info["method"])
        each = {a: method_from_spec(e["method"]) if "method" in e else default for a, e in info["sites"].items()}
    except (KeyError, ValueError, TypeError) as error:
        raise AdapterFileError(f"{folder / 'weft.json'}: {error}") from error
    return {"": default, **each}


def _default(family: Family, said: Mapping[str, Method], methods: Mapping[str, Method]) -> Method:
    """The adapter's own method: what weft.json says where that still holds, else the commonest of the family's."""
    if "" in said and not isinstance(family, Whole):
        return said[""]
    own = [m for m in methods.values() if m.name == family.method]
    return Counter(own or methods.values()).most_common(1)[0][0]


def _untrained(place: Place, own: Mapping[str, Tensor]) -> bool:
    """Whether a module that PEFT saves for the task is the base's own."""
    bias = place.seat.bias()
    same = "weight" in own and bool((own["weight"] == place.weight.to(own["weight"].device)).all())
    return same and ("bias" not in own or (bias is not None and bool((own["bias"] == bias).all())))


def _edited(found: Found, methods: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights that PEFT's start has changed, by path, as they are stored."""
    each = {a: (p, t) for a, (p, t) in found.items() if "A0" in t and p.offer.kind == "linear"}
    return {p.path: p.seat.oriented(p.weight - methods[a].scale * t["B0"] @ t["A0"]) for a, (p, t) in each.items()}


def _check_targets(config: Mapping[str, Any], found: Found, places: Places, folder: Path) -> None:
    """AdapterFileError for a module that the configuration names and the file has no tensors for."""
    if any(config.get(k) is not None for k in ("layers_to_transform", "exclude_modules")):
        return
    if config["peft_type"] == "ADAPTION_PROMPT":
        if config.get("adapter_layers") not in (None, len(found)):
            raise AdapterFileError(
                f"{folder} has {len(found)} attentions, and adapter_layers={config['adapter_layers']}"
            )
        return
    present = {p.path for p, _ in found.values()}
    saved, named = config.get("modules_to_save") or (), config.get("target_modules")
    targets = frozenset(named) if isinstance(named, list) else named
    for path in places.modules:
        if path in present or not _is_named(path, targets):
            continue
        place = places.map_at(path)
        if place is None or any(re.match(rf"(^|.*\.){m}($|\..*)", path) for m in saved):
            continue
        if config.get("ensure_weight_tying") and any(f.path in present for f in followers(place, places)):
            continue
        raise AdapterFileError(f"{folder} lacks the tensors of {path}, which target_modules of its {CONFIG} names")


def _is_named(path: str, targets: Any) -> bool:
    """Whether PEFT's target_modules name a path: by its end, or by an expression for the whole of it."""
    if isinstance(targets, str):
        return targets != "all-linear" and re.fullmatch(targets, path) is not None
    return any(end in (targets or ()) for end in ends_of(path))
