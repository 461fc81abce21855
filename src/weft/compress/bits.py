"""Whole numbers in few bits, one after another, and places among many in Golomb-Rice codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MOST_BITS", "Gaps", "pack", "pack_places", "unpack", "unpack_places"]

MOST_BITS = 24
"""Of one number that is packed: what an int32 holds with room to shift."""

Gaps = tuple[int, int, int]
"""How places were packed: how many, the bits of a remainder, and the bytes of what comes before the remainders."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bytes [ceil(N * bits / 8)] that hold N whole numbers below 2 ** bits; the first are lowest."""
    _check(bits)
    flat = codes.flatten().to(torch.uint8 if bits <= 8 else torch.int32)
    planes = ((flat[:, None] >> _shifts(bits, flat)) & 1).to(torch.uint8).flatten()
    rows = F.pad(planes, (0, -len(planes) % 8)).view(-1, 8)
    return (rows << _shifts(8, rows)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers of what `pack` made: uint8, or int32 where they do not fit. ValueError for too few."""
    _check(bits)
    if packed.numel() * 8 < count * bits:
        raise ValueError(f"{packed.numel()} bytes are too few for {count} numbers of {bits} bits")
    planes = ((packed[:, None] >> _shifts(8, packed)) & 1).flatten()[: count * bits].view(count, bits)
    if bits > 8:
        planes = planes.to(torch.int32)
    return (planes << _shifts(bits, planes)).sum(1, dtype=planes.dtype)


def pack_places(places: Tensor) -> tuple[Tensor, Gaps]:
    """Ascending places as bytes, and how to read them: the gaps between them in Golomb-Rice codes.

    A gap is a quotient, in unary, and a remainder of b bits, with the b that makes all of them shortest. At a share p
    of places that are taken by chance this is within 0.03 bits a place of the entropy. The quotients come first, so
    that all of them are read at once.
    """
    gaps = places.diff(prepend=places.new_tensor([-1])) - 1
    width = min(range(MOST_BITS), key=lambda b: len(gaps) * b + int((gaps >> b).sum()))
    ends = ((gaps >> width) + 1).cumsum(0) - 1
    unary = torch.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=torch.uint8).index_fill_(0, ends, 1)
    first = pack(unary, 1)
    rest = [pack(gaps & (2**width - 1), width)] if width else []
    return torch.cat([first, *rest]), (len(gaps), width, len(first))


def unpack_places(packed: Tensor, how: Gaps) -> Tensor:
    """What `pack_places` was given, int64. ValueError for bytes that hold something else."""
    count, width, num_unary = how
    ends = unpack(packed[:num_unary], 1, num_unary * 8).nonzero().flatten()[:count]
    if len(ends) < count:
        raise ValueError(f"{num_unary} bytes hold the quotients of {len(ends)} gaps, and there should be {count}")
    gaps = ends.diff(prepend=ends.new_tensor([-1])) - 1
    if width:
        gaps = (gaps << width) + unpack(packed[num_unary:], width, count)
    return (gaps + 1).cumsum(0) - 1


def _shifts(bits: int, like: Tensor) -> Tensor:
    return torch.arange(bits, dtype=like.dtype, device=like.device)


def _check(bits: int) -> None:
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"numbers of {bits} bits cannot be packed: give 1 to {MOST_BITS}")
