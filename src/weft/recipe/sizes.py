"""Sizes of memory as people write them: "2GB", "512 MiB", or a number of bytes."""

from __future__ import annotations

import re

__all__ = ["parse_bytes"]

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}


def parse_bytes(text: str) -> int:
    """The number of bytes that a size such as "2GB" or "1.5 GiB" names. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"{text!r} is no size: write a number and a unit, such as 2GB, 512MB or 1.5GiB")
    return int(float(found[1]) * _UNITS[found[2]])
