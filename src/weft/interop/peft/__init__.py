"""HF PEFT's adapter folders: adapter_config.json and adapter_model.safetensors, read and written without PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from weft.adapter import Stored
from weft.attach import Record
from weft.interop.peft import (  # noqa: F401  (each registers its families)
    blocks,
    clusters,
    gains,
    joint,
    low_rank,
    products,
    prompts,
    random_bases,
    rotations,
    skills,
    sparse,
    spectral,
    supports,
    tokens,
    values,
)
from weft.interop.peft.config import read_config
from weft.interop.peft.family import FAMILIES
from weft.interop.peft.mixtures import PEFT_TYPE, read_mixture
from weft.interop.peft.place import Unwritable
from weft.interop.peft.reading import from_peft
from weft.interop.peft.writing import to_peft

__all__ = ["cannot_write", "is_renaming", "read", "write"]


def cannot_write(model: nn.Module, record: Record) -> str | None:
    """Why an adapter cannot be a PEFT folder, or None."""
    try:
        to_peft(model, record)
    except Unwritable as reason:
        return str(reason)
    return None


def is_renaming(record: Record) -> bool:
    """Whether a PEFT folder holds the same bits under other names, so that reading it back is exact."""
    methods = {s.method for s in record.plan.sites}
    made = {f.method for f in FAMILIES if not f.renames}
    return not any(m.name in made or getattr(m, "projection", False) for m in methods)


def write(model: nn.Module, record: Record) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a PEFT folder; ValueError where `cannot_write` gives a reason."""
    try:
        return to_peft(model, record)
    except Unwritable as reason:
        raise ValueError(str(reason)) from reason


def read(model: nn.Module, folder: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None) -> Stored:
    """What a PEFT folder holds, in Weft's own terms; AdapterFileError names whatever Weft does not have.

    tensors: the contents of its safetensors file. info: its weft.json, where it has one, for what PEFT cannot say.
    """
    config = read_config(folder)
    if config["peft_type"].upper() == PEFT_TYPE:
        return read_mixture(model, folder, tensors, config)
    return from_peft(model, folder, tensors, info)
