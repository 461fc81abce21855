"""ComPEFT: of a change, the signs of its largest entries and one number."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.compress.bits import pack, pack_places, unpack, unpack_places
from weft.compress.code import Code

__all__ = ["ALPHAS", "Ternary", "ternary"]

ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
"""What the paper tries for alpha on validation data."""


class Ternary(Code):
    """A tensor of start - scale, start and start + scale: where it leaves the start in Golomb-Rice codes, and a sign.

    scales: scale, start. options: see `weft.compress.bits.Gaps`.
    """

    name = "ternary"

    @property
    def scale(self) -> float:
        """By how much an entry leaves the start."""
        return float(self.scales[0])

    def tensor(self) -> Tensor:
        if len(self.options) != 3 or len(self.scales) != 2:
            raise ValueError(f"a ternary has 2 scales and 3 options, not {len(self.scales)} and {len(self.options)}")
        count, width, num_unary = self.options
        num_places = num_unary + -(-count * width // 8)
        self.checked(num_codes=num_places + -(-count // 8), num_scales=2, num_options=3)
        places = unpack_places(self.codes[:num_places], (count, width, num_unary))
        if count and int(places[-1]) >= self.numel:
            raise ValueError(f"entry {int(places[-1])} is beyond a tensor of {self.shape}")
        signs = unpack(self.codes[num_places:], 1, count).float() * 2 - 1
        made = self.scales[1].expand(self.numel).clone()
        made[places] += self.scales[0] * signs
        return made.view(self.shape).to(self.dtype)


def ternary(change: Tensor, *, density: float = 0.2, alpha: float | None = None, start: float = 0.0) -> Ternary:
    """A trained tensor, less what it started from, as signs and one scale.

    t' = alpha std(t) sign(t) at the share `density` of entries with the largest magnitudes, 0 elsewhere.
    alpha: as tuned on validation data (the paper tries `ALPHAS`). By default the scale that comes nearest to the
        tensor, the mean magnitude of the kept entries. A whole adapter with one scale is one long tensor.
    start: what all entries started from; t is what they are beyond it.
    Yadav et al. 2023, arXiv 2311.13171. Of the two ways of the paper to store the signs this is the smaller: at a
    density of 0.1 it takes 0.58 bits an entry, where two masks take 2.
    Raises ValueError for a density outside of 0 to 1.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is the share of entries that are kept, above 0 and at most 1; got {density}")
    flat = change.detach().flatten().float().cpu() - start
    kept = flat.abs().topk(max(1, round(density * flat.numel())))
    scale = kept.values.mean() if alpha is None else alpha * flat.std()
    places = kept.indices.sort().values
    packed, how = pack_places(places)
    codes = torch.cat([packed, pack(flat[places] > 0, 1)])
    return Ternary(codes, torch.tensor([float(scale), start]), tuple(change.shape), change.dtype, how)
