"""A LoRA whose ranks are gated, densely."""

from tests.common.references import apply

SMALL = [{"rank": 4, "k": 2}, {"rank": 3, "k": 3, "alpha": 2.0, "bias_rate": 0.0}]
FROZEN = {"c"}


def dense(method, t, W, b, x):
    y = apply(W, b, x)
    for i, row in enumerate(x):
        p = 1 / (1 + (-t["G"] @ row).exp()) + t.get("c", 0)
        best = p.argsort(descending=True)[: method.k]
        weight = p[best] / p[best].sum()
        y[i] = y[i] + method.alpha * sum(
            w * (t["A"][r] @ row) * t["B"][:, r] for w, r in zip(weight, best, strict=True)
        )
    return y
