"""Transformed low-rank adaptation: a tensor ring transforms the map's input, another one is added to the map."""

from dataclasses import dataclass

import torch

from weft.core import Method, option
from weft.core.tensors import chain, factors


@dataclass(frozen=True)
class TensorRing(Method):
    """y = W T x + R x,  T[i1 ... iD, j1 ... jD] = tr(T1[i1, j1] ... TD[iD, jD]),  every Td[i, j] [r, r].

    R[o1 ... oD, j1 ... jD] = tr(B1[o1] ... BD[oD] A1[j1] ... AD[jD]), of rank q^2 for slices [q, q]. T starts as the
    identity and R at zero (B1 is). The paper starts all slices of a core of T alike; here they start a little apart:
    equal ones would get equal gradients for ever. Left out is its optional penalty on T's distance from the identity.
    Tao et al. 2025, arXiv 2501.08727.
    """

    name = "tensor_ring"
    paper = "2501.08727"
    kinds = frozenset({"linear"})
    transform_rank: int = option(2, help="size of the transform's bonds (r)", minimum=1)
    residual_rank: int = option(2, help="size of the residual's bonds (q)", minimum=1)
    num_cores: int = option(4, help="cores of each ring on a side (D)", minimum=2)

    def init(self, site, op):
        r, q, t = self.transform_rank, self.residual_rank, {}
        links = [1 / r + site.normal(r, r, std=0.1 / r, salt=f"T{k}") for k in range(self.num_cores)]
        links[-1] = links[-1] / torch.linalg.multi_dot(links).trace()
        for k, (link, n) in enumerate(zip(links, factors(site.in_features, self.num_cores), strict=True)):
            t[f"T{k}"] = link[:, None, None] * torch.eye(n).to(link)[:, :, None]  # [r, n, n, r]
        for name, size in (("A", site.in_features), ("B", site.out_features)):
            for k, n in enumerate(factors(size, self.num_cores)):
                std = q**-0.5 / n if name == "A" else q**-0.5  # sqrt(written) / read where it reads n q and writes q
                t[f"{name}{k}"] = site.normal(q, n, q, std=std, salt=f"{name}{k}")
        return {**t, "B0": torch.zeros_like(t["B0"])}

    def coefficients(self, t, op):
        r, half = self.transform_rank, self.num_cores // 2
        ring = {name: [t[f"{name}{k}"] for k in range(self.num_cores)] for name in "TAB"}
        left, right = chain(ring["T"][:half]), chain(ring["T"][half:])  # [r, m, m, r]: T is r^2 Kronecker products
        if 3 * r**2 * (left.shape[1] + right.shape[1]) < op.site.in_features:  # small products are slow: measured
            ends = [(a, b) for a in range(r) for b in range(r)]
            c = {f"left{a}{b}": left[a, :, :, b] for a, b in ends} | {
                f"right{a}{b}": right[b, :, :, a] for a, b in ends
            }
        else:
            c = {"T": torch.einsum("aijb,bkla->ikjl", left, right).flatten(2).flatten(0, 1)}
        a, b = (chain(ring[name]) for name in "AB")  # [q, I, q], [q, O, q]
        return {**c, "A": a.permute(2, 0, 1).flatten(0, 1), "B": b.permute(1, 0, 2).flatten(1)}

    def forward(self, c, x, op):
        if "T" in c:
            z = op.project(x, c["T"])
        else:
            terms = [op.kron(x, c[k], c[k.replace("left", "right")]) for k in c if k.startswith("left")]
            z = sum(terms[1:], start=terms[0])
        return op.expand(op.project(x, c["A"]), c["B"], onto=op(z))
