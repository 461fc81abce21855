"""What lies in a PEFT folder beside the method's own tensors: heads trained whole, copies of the base, tied weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapter import AdapterFileError
from weft.interop.peft.config import Config
from weft.interop.peft.place import Place, Places, Unwritable
from weft.patterns import walk


def read_heads(
    rest: Mapping[str, Tensor], config: Config, places: Places, edited: Mapping[str, Tensor], folder: Path
) -> dict[str, tuple[Place, dict[str, Tensor]]]:
    """The modules trained in full, by address; every other tensor must be a copy of the base's.

    edited: weights [O, I] that PEFT's start has changed in the base, by path.
    """
    names = [*dict.fromkeys(config.get("modules_to_save") or [])]
    found: dict[str, tuple[Place, dict[str, Tensor]]] = {}
    also = _also_saved(names, places) if config.get("ensure_weight_tying") else []
    for key, value in rest.items():
        path, _, leaf = key.rpartition(".")
        if not any(_ends(above, names) for above in _ancestors(path)) and path not in also:
            _check_copy(key, path.removesuffix(".base_layer"), leaf, value, places, edited, folder)
            continue
        place = _full_place(path, leaf, places)
        if place is None:
            _check_copy(key, path, leaf, value, places, edited, folder)
        elif leaf == place.offer.param:
            found.setdefault(place.address, (place, {}))[1]["weight"] = place.seat.oriented(value).contiguous()
        else:
            found.setdefault(place.address, (place, {}))[1]["bias"] = value
    for path in places.modules:
        if _ends(path, names) and not any(k.startswith(f"{path}.") for k in rest):
            raise AdapterFileError(f"{folder} lacks the tensors of {path}, which modules_to_save names")
    return found


def write_heads(
    fulls: Sequence[tuple[Place, Mapping[str, Tensor]]], expected: Sequence[str], places: Places
) -> tuple[list[str], dict[str, Tensor]]:
    """`modules_to_save` and its tensors. expected: ends of paths that PEFT saves for the task, trained or not."""
    roots = [p for p in places.modules if _ends(p, expected)]
    changed: dict[str, Tensor] = {}
    for place, own in fulls:
        if not place.seat.stored().is_floating_point():
            raise Unwritable(f"{place.path} is quantised, and PEFT saves its packed bytes")
        changed[f"{place.path}.{place.offer.param}"] = place.seat.oriented(own["weight"])
        if "bias" in own:
            changed[f"{place.path}.{place.seat.bias_param}"] = own["bias"]
        if not any(f"{place.path}.".startswith(f"{r}.") for r in roots):
            roots.append(place.path)
    for root in roots:
        others = {p for p in places.modules if p.endswith(root) and p != root and p not in roots}
        if others:
            raise Unwritable(f"PEFT finds modules_to_save by the end of a path, and {root} ends {min(others)} too")
    state = {k: changed.get(k, v) for root in roots for k, v in _state(root, places)}
    return sorted(roots), state


def followers(place: Place, places: Places) -> list[Place]:
    """The other modules that hold a site's weight."""
    paths = [p for p in places.holders(place.module._parameters.get(place.offer.param)) if p != place.path]
    return [found for p in paths if (found := places.map_at(p)) is not None]


def mirrored(kind: str, other: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a site as those of a module that shares its weight: a table of rows is a head, transposed."""
    if (kind == "embedding") == (other == "embedding"):
        return dict(tensors)
    if "weight" in tensors:
        return {"weight": tensors["weight"].mT.contiguous()}
    return {"A": tensors["B"].mT.contiguous(), "B": tensors["A"].mT.contiguous()}


def drop_mirrored(
    found: dict[str, tuple[Place, dict[str, Tensor]]], places: Places, folder: Path, named: Collection[str]
) -> str:
    """With `ensure_weight_tying`: leave one of two sites that share a weight; returns how ties are to be treated.

    named: the addresses that weft.json has; of two the embedding stays, unless the head alone is named.
    """
    tied = "separate"
    for address, (place, own) in [*found.items()]:
        for other in followers(place, places):
            if other.address not in found or address not in found or place.offer.kind != "embedding":
                continue
            theirs, ours = found[other.address][1], mirrored("embedding", other.offer.kind, own)
            if theirs.keys() != ours.keys() or not all(torch.equal(theirs[k], ours[k]) for k in ours):
                raise AdapterFileError(
                    f"{folder}: ensure_weight_tying=True, and the tensors of {address} and {other.address} differ"
                )
            head_only = other.address in named and address not in named
            del found[address if head_only else other.address]
            tied = "share"
    return tied


def _check_copy(
    key: str, path: str, leaf: str, value: Tensor, places: Places, edited: Mapping[str, Tensor], folder: Path
) -> None:
    """AdapterFileError unless a tensor is the model's own under that name."""
    module = places.modules.get(path)
    own = None if module is None else module._parameters.get(leaf, module._buffers.get(leaf))
    if own is None:
        if module is None and leaf not in ("weight", "bias"):
            raise AdapterFileError(f"{folder} has a tensor {key!r}, which no option of its configuration explains")
        raise AdapterFileError(f"{folder} has a tensor {key!r}, and this model has no {path}.{leaf}")
    if own.shape != value.shape:
        raise AdapterFileError(
            f"{folder}: {key} is {tuple(value.shape)} and the model's own is {tuple(own.shape)}; if the adapter was "
            "made on a resized vocabulary, resize this model's first"
        )
    if path in edited and leaf == "weight":
        same = torch.allclose(value.float(), edited[path].float(), atol=1e-5, rtol=1e-4)
    else:
        same = torch.equal(value, own.detach().to("cpu", value.dtype))
    if not same:
        raise AdapterFileError(
            f"{folder}: {key} is a copy of the base's weight with other values than this model has; load the base that "
            "the adapter was made on, or name the module in modules_to_save"
        )


def _also_saved(names: Sequence[str], places: Places) -> list[str]:
    """Modules that share the weight of one that is saved: PEFT writes them too and names them nowhere."""
    roots = [place for p in places.modules if _ends(p, names) and (place := places.map_at(p)) is not None]
    return [other.path for place in roots for other in followers(place, places)]


def _full_place(path: str, leaf: str, places: Places) -> Place | None:
    """The site whose weight or bias a parameter is."""
    own = places.map_at(path)
    if own is not None:
        return own if leaf in (own.offer.param, own.seat.bias_param) else None
    return next((p for p in places.parameters_at(path) if leaf in (p.offer.param, p.seat.bias_param)), None)


def _state(root: str, places: Places) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and saved buffer below a module, without adapters."""
    module: nn.Module = places.modules[root]
    for path, child in walk(module, root):
        for name, value in (*child._parameters.items(), *child._buffers.items()):
            if value is not None and name not in child._non_persistent_buffers_set:
                yield f"{path}.{name}", value.detach()


def _ends(path: str, names: Sequence[Any]) -> bool:
    return any(path.endswith(name) for name in names)


def _ancestors(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


__all__ = ["drop_mirrored", "followers", "mirrored", "read_heads", "write_heads"]
