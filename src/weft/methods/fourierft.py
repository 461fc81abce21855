"""FourierFT: the update is the inverse Fourier transform of a few trained frequencies."""

import math
from dataclasses import dataclass

import torch

from weft.core import Frozen, Method, option


@dataclass(frozen=True)
class FourierFT(Method):
    """y = W x + s Re(ifft2(F)) x,  F [O, I] zero but for `num_frequencies` trained entries at seeded places.

    The places depend on the seed and the shape only, so that sites of one shape use the same frequencies.

    Gao et al. 2024, arXiv 2405.03003.
    """

    name = "fourierft"
    paper = "2405.03003"
    num_frequencies: int = option(1000, help="trained entries of the spectrum", minimum=1)
    scaling: float = option(150.0, help="factor on the update", above=0)
    location_seed: int = option(777, help="seed of the places", minimum=0)

    def check(self, site):
        if self.num_frequencies > math.prod(site.shape):
            raise ValueError(
                f"num_frequencies={self.num_frequencies} is more than the {math.prod(site.shape)} entries of its weight"
            )

    def init(self, site, op):
        return {"spectrum": site.zeros(self.num_frequencies), "places": Frozen(self.places(site))}

    def places(self, site):
        """Where the trained frequencies are in the flattened spectrum, [n] int32; drawn on the CPU, as PEFT does."""
        on = "meta" if torch.device(site.device).type == "meta" else "cpu"
        draw = None if on == "meta" else torch.Generator().manual_seed(self.location_seed)
        order = torch.randperm(math.prod(site.shape), generator=draw, device=on)
        return order[: self.num_frequencies].int().to(site.device)

    def coefficients(self, t, op):
        rows, columns = op.site.out_features, math.prod(op.site.shape[1:])
        half, values = columns // 2 + 1, t["spectrum"]
        values = (values if values.dtype == torch.float64 else values.float()) / 2  # no half-precision transform
        u, v = t["places"].long() // columns, t["places"].long() % columns
        # the real part is the transform of (F + F mirrored) / 2, of which half the columns say all
        u, v = torch.cat([u, -u % rows]), torch.cat([v, -v % columns])
        values = torch.where(v < half, torch.cat([values, values]), 0)
        flat = values.new_zeros(rows * half).scatter_add(0, u * half + v.clamp(max=half - 1), values)
        delta = torch.fft.irfft2(flat.view(rows, half), s=(rows, columns)) * self.scaling
        return {"delta": delta.view(op.site.shape).to(t["spectrum"].dtype)}

    def forward(self, c, x, op):
        return op.with_delta(x, c["delta"])
