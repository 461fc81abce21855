"""Tensors in code as a file holds them: all bytes in one tensor, all scales in another, and an index of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.compress.code import Code, code_class

__all__ = ["CODES", "SCALES", "expanded", "packed"]

CODES, SCALES = "packed.codes", "packed.scales"
_VERSION = 1


def packed(tensors: Mapping[str, Tensor], codes: Mapping[str, Code]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is written instead of named tensors of which some have a code, and the fact that is written with it.

    A tensor of its own for each would take more bytes in a file's header than many of them have.
    """
    kept = {name: tensor for name, tensor in tensors.items() if name not in codes}
    chosen = [(name, codes[name]) for name in tensors if name in codes]
    index = {
        name: [c.name, str(c.dtype).removeprefix("torch."), c.shape, c.options, c.codes.numel(), c.scales.numel()]
        for name, c in chosen
    }
    joined = {CODES: torch.cat([c.codes for _, c in chosen]), SCALES: torch.cat([c.scales for _, c in chosen])}
    return {**kept, **joined}, {"packed": json.dumps({"version": _VERSION, "tensors": index}, separators=(",", ":"))}


def expanded(tensors: Mapping[str, Tensor], index: str) -> dict[str, Tensor]:
    """The tensors that `packed` was given, as their codes have them. index: the fact that it gave.

    Raises ValueError with a sentence for an index of another version, an unknown code, or bytes that are not its own.
    """
    entries = _entries(index)
    if missing := {CODES, SCALES} - tensors.keys():
        raise ValueError(f"its index speaks of packed tensors, and it lacks {' and '.join(sorted(missing))}")
    codes, scales = tensors[CODES], tensors[SCALES]
    wanted = sum(e[4] for e in entries.values()), sum(e[5] for e in entries.values())
    if (codes.numel(), scales.numel()) != wanted or (codes.dtype, scales.dtype) != (torch.uint8, torch.float32):
        raise ValueError(
            f"it packs {codes.numel()} bytes and {scales.numel()} scales, and its index names {wanted[0]} and "
            f"{wanted[1]}: it is damaged"
        )
    found = {name: t for name, t in tensors.items() if name not in (CODES, SCALES)}
    parts = zip(
        codes.split([e[4] for e in entries.values()]), scales.split([e[5] for e in entries.values()]), strict=True
    )
    for (name, entry), (own_codes, own_scales) in zip(entries.items(), parts, strict=True):
        kind, dtype, shape, options = entry[:4]
        code = code_class(kind)(own_codes, own_scales, tuple(shape), _dtype(dtype), tuple(options))
        try:
            found[name] = code.tensor()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name} cannot be unpacked: {error}") from error
    return found


def _entries(index: str) -> Mapping[str, list[Any]]:
    try:
        known = json.loads(index)
        version, entries = known["version"], known["tensors"]
        whole = all(
            len(e) == 6 and all(isinstance(n, int) and n >= 0 for n in (*e[2], *e[3], e[4], e[5]))
            for e in entries.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its index of packed tensors is not readable: {error}") from error
    if version != _VERSION:
        raise ValueError(f"its tensors are packed in layout {version}, and this Weft reads {_VERSION}: upgrade weft")
    if not whole:
        raise ValueError("its index of packed tensors is not readable: an entry has not the six parts of one")
    return entries


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"there is no number format {name!r}")
    return found
