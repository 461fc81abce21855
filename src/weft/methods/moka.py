"""MoKA: a gated mixture of Kronecker products of several shapes."""

from dataclasses import dataclass

from weft.core import Method, option


@dataclass(frozen=True)
class MoKA(Method):
    """y = W x + sum_k g_k (A_k ⊗ B_k) x,  g = softmax(gate),  A_k at most [size_k, size_k].

    The gates are one number a term, whatever x is. The sides of A_k are the largest divisors of O and I up to size_k,
    where the paper names the shapes of every layer; B_k [O / a, I / c] has the rest and starts at zero.

    Sadeghi et al. 2025, arXiv 2508.03527.
    """

    name = "moka"
    paper = "2508.03527"
    sizes: tuple[int, ...] = option((16, 32), help="for every term, the largest side of its first factor")

    def check(self, site):
        if len(self.sizes) < 2 or min(self.sizes) < 1:
            raise ValueError(f"sizes={self.sizes}: a mixture has two terms or more, and no size below 1; lokr has one")

    def init(self, site, op):
        out, read, kernel = site.out_features, site.shape[1], site.shape[2:]
        t = {"gate": site.zeros(len(self.sizes))}
        for k, size in enumerate(self.sizes):
            a, c = _divisor(out, size), _divisor(read, size)
            t[f"A{k}"] = site.uniform(a, c, bound=c**-0.5, salt=f"A{k}")
            t[f"B{k}"] = site.zeros(out // a, read // c, *kernel)
        return t

    def coefficients(self, t, op):
        gate, terms, shape = t["gate"].softmax(0), range(len(self.sizes)), op.site.shape
        pairs = [(gate[k] * t[f"A{k}"], t[f"B{k}"]) for k in terms]
        # what a token costs in Kronecker products, whose small matrices run at a sixth of a large one's speed (measured
        # with 512 channels), beside the update as one matrix
        steps = sum(b.numel() * a.shape[1] + shape[0] * a.shape[1] for a, b in pairs)
        if op.site.kind == "linear" and 6 * steps < shape[0] * shape[1]:
            return {f"A{k}": a for k, (a, _) in enumerate(pairs)} | {f"B{k}": b for k, (_, b) in enumerate(pairs)}
        delta = sum((a[:, None, :, None] * b.flatten(1)[None, :, None]).flatten(2).flatten(0, 1) for a, b in pairs)
        return {"delta": delta.view(shape)}  # [O, I, *kernel]

    def forward(self, c, x, op):
        if "delta" in c:
            return op.with_delta(x, c["delta"])
        y = op(x)
        for k in range(len(self.sizes)):
            y = y + op.kron(x, c[f"A{k}"], c[f"B{k}"])
        return y


def _divisor(number, most):
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)
