"""Full, densely: the trained copies in place of the frozen ones."""

from tests.common.references import apply

SMALL = [{}]
FROZEN = set()


def dense(method, t, W, b, x):
    return apply(t["weight"], t.get("bias"), x)
