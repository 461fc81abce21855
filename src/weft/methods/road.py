"""RoAd: rotate and stretch pairs of output channels."""

from dataclasses import dataclass
from typing import Literal

import torch

from weft.core import LINEAR, Method, option


@dataclass(frozen=True)
class RoAd(Method):
    """[y1; y2] = [a1 cos(p1) z1 - a2 sin(p2) z2; a3 sin(p3) z1 + a4 cos(p4) z2],  z = W x + b in pairs.

    Variant 1 has one angle p and one stretch a per pair, variant 2 one per row, variant 4 one per entry.

    Liao and Monz 2024, arXiv 2409.00119.
    """

    name = "road"
    paper = "2409.00119"
    kinds = LINEAR
    variant: Literal[1, 2, 4] = option(1, help="numbers per pair: 1, 2 or 4 angles and as many stretches")
    group_size: int = option(64, help="channel i is paired with i + group_size / 2 of its group", minimum=2)

    def check(self, site):
        if site.out_features % self.group_size or self.group_size % 2:
            raise ValueError(
                f"group_size={self.group_size} does not divide its {site.out_features} output channels, or is odd"
            )

    def init(self, site, op):
        size = site.out_features * self.variant // 2
        return {"theta": site.zeros(size), "alpha": site.ones(size)}

    def coefficients(self, t, op):
        half = self.group_size // 2
        theta, alpha = t["theta"], t["alpha"]
        if self.variant == 1:  # one pair, two rows
            theta, alpha = (v.view(-1, 1, half).expand(-1, 2, half).flatten() for v in (theta, alpha))
        if self.variant == 4:  # the cosines of a group, then its sines
            (t1, t2), (a1, a2) = (v.view(-1, 2, self.group_size).unbind(1) for v in (theta, alpha))
        else:
            (t1, t2), (a1, a2) = (theta, theta), (alpha, alpha)
        across = (a2 * t2.sin()).view(-1, 2, half)
        channels = torch.arange(op.site.out_features, device=theta.device).view(-1, 2, half)
        return {
            "along": (a1 * t1.cos()).flatten(),
            "across": torch.stack([across[:, 1], -across[:, 0]], 1).flatten(),
            "partner": channels.flip(1).flatten(),
        }

    def forward(self, c, x, op):
        z = op(x)
        return op.scale(z, c["along"]) + op.permute(op.scale(z, c["across"]), c["partner"])
