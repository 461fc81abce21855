"""An adapter on disk: a folder with its tensors, its specification and where it came from. safetensors only."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from weft.borrowed import borrowed
from weft.compress.layout import expanded
from weft.core.method import Frozen, Method
from weft.errors import AdapterError, WeftError
from weft.fresh import Record
from weft.kinds.quantised import codes_of
from weft.registry import method_from_spec
from weft.targets import Plan, walk

__all__ = [
    "CONFIG", "FORMAT", "INFO", "TENSORS", "AdapterFileError", "Stored", "describe", "fingerprint", "from_native",
    "matched", "native_tensors", "read_info", "read_tensors", "remember_fingerprint", "write_folder",
]  # fmt: skip

FORMAT, PLAIN = 2, 1
"""The newest format of a folder, whose tensors need more than their own file's bytes to be read, and the plain one."""
TENSORS, INFO, CONFIG = "adapter_model.safetensors", "weft.json", "adapter_config.json"


class AdapterFileError(WeftError, ValueError):
    """An adapter folder that cannot be read, or does not fit the model."""


@dataclass(frozen=True)
class Stored:
    """What a folder holds, in Weft's own terms: the plan's ingredients and its tensors."""

    method: Method
    sites: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Mapping[str, Tensor]]
    shared: Mapping[str, Mapping[str, Tensor]]
    base: Mapping[str, Any]
    targets: Any = None
    tied: str = "refuse"


def read_info(folder: Path) -> dict[str, Any] | None:
    """The folder's weft.json, or None when there is none (a plain PEFT folder)."""
    file = folder / INFO
    if not file.exists():
        return None
    try:
        info = json.loads(file.read_text())
        version = int(info["format"])
        absent = {"layout", "method", "sites", "base"} - info.keys()
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterFileError(f"{file} is not readable: {error}") from error
    if version > FORMAT:
        raise AdapterFileError(f"{file} has format {version}, this Weft reads up to {FORMAT}: upgrade weft")
    if absent:
        raise AdapterFileError(f"{file} is not readable: it lacks {', '.join(sorted(absent))}")
    return info


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder; a pickle or a damaged file is refused."""
    file = folder / TENSORS
    if not file.exists():
        pickled = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
        what = f"only {pickled[0]}, a pickle, which is not opened: convert it to safetensors" if pickled else "none"
        raise AdapterFileError(f"{folder} should hold {TENSORS}; there is {what}")
    try:
        # From bytes, which takes a tenth of opening tensor by tensor where they are small. Copies, because at the
        # file's own offsets tensors are unaligned, and kernels then round differently.
        data = file.read_bytes()
        found = {name: tensor.clone() for name, tensor in load(data).items()}
        facts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{file} is damaged or cut short: {error}") from error
    try:
        found = expanded(found, facts["packed"]) if "packed" in facts else found
        return {**found, **borrowed(folder, facts["borrowed"])} if "borrowed" in facts else found
    except ValueError as error:
        raise AdapterFileError(f"{file}: {error}") from error


def describe(model: nn.Module, record: Record, layout: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of weft.json."""
    from weft import __version__

    plan = record.plan
    sites = {}
    for s in plan.sites:
        entry: dict[str, Any] = {"kind": s.site.kind, "shape": list(s.site.shape)}
        if s.method != plan.method:
            entry["method"] = s.method.spec()
        if s.offer.through_weight:
            entry["through"] = "weight"
        sites[s.site.address] = entry
    return {
        "format": PLAIN,
        "weft": __version__,
        "name": plan.name,
        "layout": layout,
        "method": plan.method.spec(),
        "targets": plan.targets,
        "tied": plan.tied,
        "sites": sites,
        "parameters": plan.num_parameters,
        "base": {**fingerprint(model), "tied": bool(provenance.get("repaired")) or is_repair(plan)},
        "provenance": dict(provenance),
    }


def is_repair(plan: Plan) -> bool:
    """Whether an adapter makes up for what quantising its base lost: it then is right on these very codes alone."""
    return any("original" in s.method.needs() for s in plan.sites)


def native_tensors(record: Record) -> dict[str, Tensor]:
    """`<address>.<tensor>` for every site and `shared.<method>.<tensor>` for what the sites share."""
    found = {}
    for address, adapter in record.adapters.items():
        found.update({f"{address}.{k}": v for k, v in {**adapter._parameters, **adapter._buffers}.items()})
    for method, holder in record.shared.items():
        found.update({f"shared.{method}.{k}": v for k, v in holder.tensors().items()})
    return {k: v.detach().contiguous() for k, v in found.items() if v is not None}


def write_folder(
    path: Path, files: Mapping[str, str], tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None
) -> Path:
    """Write a folder under a temporary name beside its place, then rename it; an old one goes only after that.

    facts: what the tensors' file says of how they are to be read.
    """
    if path.exists() and not _replaceable(path):
        raise AdapterFileError(f"{path} is there and is no adapter: it is not replaced; name a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        save_file({k: v.cpu() for k, v in tensors.items()}, temporary / TENSORS, {"format": "pt", **(facts or {})})
        for name, text in files.items():
            (temporary / name).write_text(text)
        replaced = path.with_name(f"{temporary.name}.old")
        if path.exists():
            path.replace(replaced)
        temporary.replace(path)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise AdapterFileError(f"could not write {path}: {error}; what was there before is still there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _replaceable(path: Path) -> bool:
    """Whether what is at a path may go: an adapter, or an empty folder."""
    if not path.is_dir():
        return False
    return not any(path.iterdir()) or any((path / name).exists() for name in (INFO, TENSORS, CONFIG))


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What identifies a base: its class, configuration, and a digest of samples of its weights.

    Values are rounded to bfloat16 first, so that the dtype a base is loaded in does not matter. `unquantised` covers
    norms and embeddings only, which stay as they are when linear layers are quantised; `codes` the packed weights
    only, and is None where there are none.
    """
    merged = model.__dict__["weave"].merged if "weave" in model.__dict__ else None
    if merged is not None:
        raise AdapterError(f"{merged!r} is merged into the weights; unmerge, so that the base is known")
    stamp = _stamp(model)
    kept = model.__dict__.get("fingerprint")
    if kept is not None and kept[0] == stamp:
        return kept[1]
    every, plain, packed = (hashlib.blake2b(digest_size=16) for _ in range(3))
    whole, quantised = True, False
    for path, module in walk(model):
        codes = codes_of(module)
        if codes is not None:
            quantised = True
            packed.update(path.encode() + codes.flatten()[:: max(1, codes.numel() // 64)].cpu().numpy().tobytes())
        for name, p in module._parameters.items():
            if p is None:
                continue
            if not p.is_floating_point() or type(p.data) is not Tensor:
                whole = False
                continue
            sample = p.detach().flatten()[:: max(1, p.numel() // 64)].to(torch.bfloat16).cpu()
            digest = f"{path}.{name}{tuple(p.shape)}".encode() + sample.view(torch.int16).numpy().tobytes()
            every.update(digest)
            if p.ndim == 1 or isinstance(module, nn.Embedding):
                plain.update(digest)
    config = getattr(model, "config", None)
    found = {
        "class": type(model).__name__,
        "name": getattr(config, "_name_or_path", None) or None,
        "config": _config_digest(config),
        "weights": every.hexdigest() if whole else None,
        "unquantised": plain.hexdigest(),
        "codes": packed.hexdigest() if quantised else None,
    }
    if "weave" in model.__dict__:
        model.__dict__["fingerprint"] = stamp, found
    return found


def remember_fingerprint(model: nn.Module, known: dict[str, Any]) -> None:
    """Say what an adapted model's base is, where its weights were only moved (spread over processes)."""
    model.__dict__["fingerprint"] = _stamp(model), known


def _stamp(model: nn.Module) -> list[tuple[int, int, int]]:
    """What changes when a weight of the base is replaced or written to."""
    own = [p for _, m in walk(model) for p in m._parameters.values() if p is not None]
    # a 4-bit layer that is written anew gets another state object, and its parameter counts no new version
    return [(id(p), 0 if p.is_inference() else p._version, id(getattr(p, "quant_state", None))) for p in own]


def _config_digest(config: Any) -> str | None:
    if config is None or not hasattr(config, "to_dict"):
        return None
    skip = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache")
    text = json.dumps({k: v for k, v in config.to_dict().items() if k not in skip}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def from_native(info: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Stored:
    """What a native folder holds, from its weft.json and its tensors by name."""
    try:
        method = method_from_spec(info["method"])
    except (ValueError, TypeError) as error:
        raise AdapterFileError(f"{folder / INFO}: {error}") from error
    own: dict[str, dict[str, Tensor]] = {a: {} for a in info["sites"]}
    shared: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        place, _, leaf = key.rpartition(".")
        is_shared = place.startswith("shared.") and place not in own  # a base may call a module `shared` too
        holder = shared.setdefault(place[7:], {}) if is_shared else own.setdefault(place, {})
        holder[leaf] = value
    return Stored(method, info["sites"], own, shared, info["base"], info.get("targets"), info.get("tied", "refuse"))


def matched(
    expected: Mapping[str, Tensor | Frozen],
    tensors: Mapping[str, Tensor],
    where: str,
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> dict[str, Tensor | Frozen]:
    """Tensors as they are expected to be; AdapterFileError names what is missing, extra or misshapen."""
    if expected.keys() != tensors.keys():
        missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        said = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has an unknown {', '.join(extra)}"] * bool(extra)
        raise AdapterFileError(f"{folder}: {where} {' and '.join(said)}")
    found: dict[str, Tensor | Frozen] = {}
    for key, like in expected.items():
        want, value = like.tensor if isinstance(like, Frozen) else like, tensors[key]
        if want.shape != value.shape:
            raise AdapterFileError(
                f"{folder}: {where}.{key} is {tuple(value.shape)}, and {tuple(want.shape)} is expected here"
            )
        if want.is_floating_point() != value.is_floating_point():
            raise AdapterFileError(f"{folder}: {where}.{key} is {value.dtype}, and {want.dtype} is expected")
        value = value.to(device=device, dtype=dtype if dtype and value.is_floating_point() else None)
        found[key] = Frozen(value) if isinstance(like, Frozen) else value
    return found
