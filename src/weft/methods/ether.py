"""ETHER: reflect blocks of the input at trained hyperplanes; ETHER+ transforms the outputs as well."""

from dataclasses import dataclass

from weft.core import Frozen, Method, option


@dataclass(frozen=True)
class ETHER(Method):
    """y = W H(u) H(u0) x + b, H(u) = I - 2 u u^T.

    ETHER+ (`plus`): y = G(p, q) W G(u, v) x + b, G(u, v) = I - u u^T + v v^T.

    Vectors have length 1 in every block. A reflection is never the identity: the frozen start u0 undoes the first one,
    so that training starts at the base. G starts as the identity, with u = v.

    Bini et al. 2024, arXiv 2405.20271.
    """

    name = "ether"
    paper = "2405.20271"
    kinds = frozenset({"linear", "conv", "experts"})
    bias_outside = True
    num_blocks: int = option(4, help="blocks that turn on their own; divides the numbers of channels", minimum=1)
    plus: bool = option(False, help="ETHER+: two vectors a side, on both sides")

    def check(self, site):
        sizes = [site.in_features, site.out_features] if self.plus else [site.in_features]
        if any(size % self.num_blocks for size in sizes):
            raise ValueError(
                f"num_blocks={self.num_blocks} does not divide its {' and '.join(map(str, sizes))} channels"
            )

    def init(self, site, op):
        u = site.normal(self.num_blocks, site.in_features // self.num_blocks, salt="u")
        if not self.plus:
            return {"u": u, "u0": Frozen(u.clone())}
        p = site.normal(self.num_blocks, site.out_features // self.num_blocks, salt="p")
        return {"u": u, "v": u.clone(), "p": p, "q": p.clone()}

    def coefficients(self, t, op):
        return {k: (v / v.norm(dim=-1, keepdim=True)).unsqueeze(1) for k, v in t.items()}  # [N, 1, block]

    def forward(self, c, x, op):
        def along(y, u):  # u u^T y, block by block
            return op.rotate(op.rotate(y, u), u.mT)

        if not self.plus:
            x = x - 2 * along(x, c["u0"])
            return op(x - 2 * along(x, c["u"]))
        y = op(x - along(x, c["u"]) + along(x, c["v"]))
        return y - along(y, c["p"]) + along(y, c["q"])
