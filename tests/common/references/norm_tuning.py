"""Norm tuning, densely."""

SMALL = [{}, {"offset": False}]
FROZEN = set()


def dense(method, t, W, b, x):
    y = t["weight"] * x
    offset = t.get("bias", b)
    return y if offset is None else y + offset
