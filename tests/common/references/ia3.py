"""IA3, densely."""

from tests.common.references import apply

SMALL = [{}, {"feedforward": True}]
FROZEN = set()


def dense(method, t, W, b, x):
    if method.feedforward:
        return apply(W, b, (x.movedim(1, -1) * t["gain"]).movedim(-1, 1))
    return apply(W, b, x) * t["gain"]
