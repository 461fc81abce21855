"""Adapters as folders: one `save` and one `load` for Weft's own layout and HF PEFT's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.adapter import (
    CONFIG,
    FORMAT,
    INFO,
    TENSORS,
    AdapterFileError,
    Stored,
    describe,
    fingerprint,
    from_native,
    matched,
    native_tensors,
    read_info,
    read_tensors,
    write_folder,
)
from weft.attach import attach_plan, records, use, weave_of
from weft.collector import resting_collector
from weft.core.method import Frozen, Method
from weft.errors import AdapterError, nearest
from weft.fresh import Record
from weft.interop import peft
from weft.registry import method_from_spec
from weft.targets import Plan, PlannedSite, candidates, site_of, structure

__all__ = ["Opened", "load", "open_folder", "save"]

Format = Literal["auto", "weft", "peft"]


def save(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    format: Format = "auto",
    provenance: Mapping[str, Any] | None = None,
    held: tuple[Mapping[str, Tensor], Mapping[str, str]] | None = None,
) -> Path:
    """Write one adapter as a folder; a folder that is there is replaced in one step.

    format: "peft" writes the layout that HF PEFT, vLLM and the Hub read; "weft" the native one, which every method has;
        "auto" is "peft" where that is a mere renaming of the same bits, else "weft". `weft.json` is always beside it.
    provenance: facts to keep with it (data and recipe fingerprints, seeds, metrics, parents).
    held: what the file holds instead of the adapter's native tensors, and the facts that say how these are read out of
        it (`weft.compress.packed`, `weft.borrowed.lent`).
    """
    record, name = _record(model, name)
    if (merged := weave_of(model).merged) is not None:
        raise AdapterError(f"{merged!r} is merged into the weights; unmerge before saving, so that the base is known")
    if held is not None:
        if format == "peft":
            raise AdapterFileError(f"{name!r} cannot be written as a PEFT folder: PEFT reads no packed tensors")
        info = {**describe(model, record, "weft", provenance or {}), "format": FORMAT}
        return write_folder(Path(path), {INFO: json.dumps(info) + "\n"}, *held)
    reason = peft.cannot_write(model, record) if format != "weft" else "the native layout was asked for"
    if format == "peft" and reason is not None:
        raise AdapterFileError(f"{name!r} cannot be written as a PEFT folder: {reason}; save it with format='weft'")
    as_peft = format == "peft" or (format == "auto" and reason is None and peft.is_renaming(record))
    info = describe(model, record, "peft" if as_peft else "weft", provenance or {})
    files: dict[str, str] = {INFO: json.dumps(info, indent=2) + "\n"}
    if as_peft:
        config, tensors = peft.write(model, record)
        files[CONFIG] = json.dumps(config, indent=2, sort_keys=True) + "\n"
    else:
        tensors = native_tensors(record)
    return write_folder(Path(path), files, tensors)


def load(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    any_base: bool = False,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Put an adapter from a folder (Weft's or HF PEFT's) on a model; returns what was adapted.

    It is used at once if nothing else is in use; otherwise say `weft.use`.
    any_base: accept an adapter that was made on other base weights than these.
    Raises AdapterFileError, before anything is changed, for a missing or extra tensor, a wrong shape, or another base.
    """
    with resting_collector():
        opened = open_folder(model, path, name, any_base=any_base, dtype=dtype)
        attach_plan(model, opened.plan, tensors=opened.tensors, shared=opened.shared)
    if weave_of(model).route is None and weave_of(model).merged is None:
        use(model, opened.plan.name)
    return opened.plan


@dataclass(frozen=True)
class Opened:
    """What a folder puts on a model: the plan, and every tensor by address and by what sites share."""

    plan: Plan
    tensors: Mapping[str, Mapping[str, Tensor | Frozen]]
    shared: Mapping[str, Mapping[str, Tensor | Frozen]]


def open_folder(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    any_base: bool = False,
    dtype: torch.dtype | None = None,
) -> Opened:
    """What `load` would put on a model, which stays as it is; raises what `load` raises."""
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterFileError(f"{folder} is not a folder; an adapter is a folder with {TENSORS}")
    info = read_info(folder)
    tensors = read_tensors(folder)
    if info is not None and not any_base:  # before any name of a module: those of another base are not here
        _same_base(model, info.get("base", {}), folder)
    if info is not None and info["layout"] == "weft":
        stored = from_native(info, tensors, folder)
    else:
        stored = peft.read(model, folder, tensors, info)
    plan = _plan(model, stored, name or (info or {}).get("name") or folder.name, folder)
    sites = _by_address(plan)
    own = {a: _checked(planned, stored.tensors.get(a, {}), folder, dtype) for a, planned in sites.items()}
    extra = sorted(stored.tensors.keys() - own.keys())
    if extra:
        raise AdapterFileError(
            f"{folder} has tensors for {', '.join(extra[:3])}, which its specification does not name"
        )
    return Opened(plan, own, _checked_shared(plan, stored.shared, folder))


def _same_base(model: nn.Module, base: Mapping[str, Any], folder: Path) -> None:
    here = fingerprint(model)
    if base.get("tied") and base.get("codes") != here["codes"]:
        raise AdapterFileError(
            f"{folder} makes up for what quantising its base lost, and this {here['name'] or here['class']} "
            f"{'holds other codes' if here['codes'] else 'is not quantised'}: load the very base it was trained on "
            f"({base.get('name') or 'see its recipe'}, quantised as in its recipe), or say any_base=True if you mean it"
        )
    key = "weights" if base.get("weights") and here["weights"] else "unquantised"
    if base.get(key) != here[key]:
        same = "the same configuration but other weights" if base.get("config") == here["config"] else "another model"
        raise AdapterFileError(
            f"{folder} was made on {base.get('name') or base.get('class')}, and this {here['name'] or here['class']} "
            f"is {same}; load its own base, or say any_base=True if you mean it"
        )


def _record(model: nn.Module, name: str | None) -> tuple[Record, str]:
    known = records(model)
    if name is None and len(known) == 1:
        name = next(iter(known))
    if name is None or name not in known:
        wanted = "which adapter? name one" if name is None else f"this model has no adapter {name!r}"
        raise AdapterError(f"{wanted}; {nearest(name or '', known) if known else 'it has none'}")
    return known[name], name


def _plan(model: nn.Module, stored: Stored, name: str, folder: Path) -> Plan:
    known = {s.site.address: s for record in records(model).values() for s in record.plan.sites}
    unknown = stored.sites.keys() - known.keys()
    places = {c.address: c for c in candidates(model)} if unknown else {}
    planned = []
    for i, (address, entry) in enumerate(stored.sites.items()):
        method = _method_at(entry, stored.method, folder)
        if address in known:
            site, offer, path = known[address].site, known[address].offer, known[address].path
        elif address in places:
            c = places[address]
            offer, path = c.offer, c.path
            offer = offer.read_as_weight() if entry.get("through") == "weight" else offer
            site = site_of(c.module, address, offer, index=i, count=len(stored.sites))
        else:
            raise AdapterFileError(f"{folder} adapts {address!r}, which this model lacks; {nearest(address, places)}")
        if "shape" in entry and tuple(entry["shape"]) != site.shape:
            raise AdapterFileError(
                f"{folder}: {address} was {tuple(entry['shape'])} where the adapter was made and is {site.shape} here"
            )
        if site.kind not in method.kinds:
            raise AdapterFileError(
                f"{folder}: {address} is of kind {site.kind} here, which {method.name} does not adapt"
            )
        planned.append(PlannedSite(site, method, path, offer))
    return Plan(name, stored.method, tuple(planned), stored.targets, stored.tied)


def _method_at(entry: Mapping[str, Any], default: Method, folder: Path) -> Method:
    """The method of one site: the adapter's own unless the site names another."""
    try:
        return method_from_spec(entry["method"]) if "method" in entry else default
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterFileError(f"{folder / INFO}: {error}") from error


def _by_address(plan: Plan) -> dict[str, PlannedSite]:
    return {s.site.address: s for s in plan.sites}


def _checked(
    planned: PlannedSite, tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype | None
) -> dict[str, Tensor | Frozen]:
    """A site's tensors as its method expects them; AdapterFileError names what is missing, extra or misshapen."""
    site = planned.site
    return matched(structure(planned.method, site), tensors, site.address, folder, site.device, dtype)


def _checked_shared(
    plan: Plan, shared: Mapping[str, Mapping[str, Tensor]], folder: Path
) -> dict[str, dict[str, Tensor | Frozen]]:
    expected, device = plan.shared("meta"), plan.sites[0].site.device
    return {
        name: matched(expected.get(name, {}), shared.get(name, {}), f"shared.{name}", folder, device, None)
        for name in expected.keys() | shared.keys()
    }
