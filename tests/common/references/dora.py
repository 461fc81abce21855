"""DoRA, densely."""

from tests.common.references import apply, product

SMALL = [{"rank": 4}, {"rank": 2, "alpha": 3.0, "rank_stabilised": True, "dropout": 0.3}]
DETACHED = "section 4.3 holds the row lengths constant for autograd"
FROZEN = set()


def dense(method, t, W, b, x):
    s = method.alpha / (method.rank**0.5 if method.rank_stabilised else method.rank)
    V = W + s * product(t["B"], t["A"], x.shape[1] // W.shape[1])
    length = V.flatten(1).square().sum(1).sqrt()
    y = apply(V, None, x) * t["magnitude"] / length
    return y if b is None else y + b
