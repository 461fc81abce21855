"""Shared basis, densely."""

from tests.common.references import apply

SMALL = [{"rank": 3}, {"rank": 4, "diagonal": True}]
FROZEN = {"U", "V"}


def dense(method, t, W, b, x):
    middle = t["S"].diag() if method.diagonal else t["S"]
    return apply(W + (t["U"] @ middle @ t["V"].flatten(1)).view(W.shape), b, x)
