"""WaveFT: the update is the inverse wavelet transform of a few trained coefficients."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from weft.core import Frozen, Method, option
from weft.core.entries import added, entries

FILTERS = {"db1": (4, 4), "db2": (1 + 3**0.5, 3 + 3**0.5, 3 - 3**0.5, 1 - 3**0.5)}  # times the root of 32


@dataclass(frozen=True)
class WaveFT(Method):
    """y = W x + s IDWT(F) x,  F [O, I] zero but for `num_frequencies` trained entries at seeded places.

    An entry adds the outer product of two short filters. Bilican et al. 2025, arXiv 2505.12532.
    """

    name = "waveft"
    paper = "2505.12532"
    num_frequencies: int = option(2592, help="trained coefficients", minimum=1)
    scaling: float = option(25.0, help="factor on the update", above=0)
    wavelet: Literal["db1", "db2"] = option("db1", help="Haar's filters, or Daubechies' of four taps")
    location_seed: int = option(777, help="seed of the places", minimum=0)

    def check(self, site):
        if self.num_frequencies > (most := math.prod(site.shape)):
            raise ValueError(f"num_frequencies={self.num_frequencies} is more than its weight's {most} entries")

    def init(self, site, op):
        return {"spectrum": site.zeros(self.num_frequencies), "places": Frozen(self.places(site))}

    def places(self, site):
        """Where the trained coefficients are in the flattened F, [n] int32; drawn on the CPU, as PEFT does."""
        seed = torch.Generator().manual_seed(self.location_seed)
        draw = {"device": "meta"} if torch.device(site.device).type == "meta" else {"generator": seed}
        return torch.randperm(math.prod(site.shape), **draw)[: self.num_frequencies].int().to(site.device)

    def coefficients(self, t, op):
        at, rows, columns = t["places"].long(), op.site.out_features, math.prod(op.site.shape[1:])
        (u, below, inside_u), (v, right, inside_v) = self._taps(at // columns, rows), self._taps(at % columns, columns)
        low = t["spectrum"].new_tensor(FILTERS[self.wavelet]) / 32**0.5
        bands = torch.stack([low, low.flip(0) * low.new_tensor([1, -1]).repeat(len(low) // 2)])
        # details of the rows are in the right half of F and those of the columns in the lower one, as PEFT has it
        patch = (bands[right] * inside_u).unsqueeze(2) * (bands[below] * inside_v).unsqueeze(1)  # [n, L, L]
        values = (self.scaling * t["spectrum"].view(-1, 1, 1) * patch).flatten()
        return entries(values, (u.unsqueeze(2) * columns + v.unsqueeze(1)).flatten(), op.site.shape)

    def forward(self, c, x, op):
        return added(c, x, op)

    def _taps(self, at, size):
        """Where along one side an entry's filter lies [n, L], in which half its entry is, and which taps are inside."""
        half = (size + (taps := len(FILTERS[self.wavelet])) - 1) // 2  # of F, with room for what reaches over its edges
        at = at + (2 * half - size) // 2
        place = 2 * (at % half).unsqueeze(1) + torch.arange(2 - taps, 2, device=at.device)
        return place.clamp(0, size - 1), at // half, (place >= 0) & (place < size)
