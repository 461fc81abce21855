"""A LoRA whose ranks are gated, densely."""

from tests.common.references import apply

SMALL = [{"rank": 4, "k": 2}, {"rank": 3, "k": 3, "alpha": 2.0, "balance": 0.0}]


def dense(method, t, W, b, x):
    y = apply(W, b, x)
    for i, row in enumerate(x):
        score = t["G"] @ row
        order = score + t["c"] if method.balance else score
        best = order.argsort(descending=True)[: method.k]
        weight = score[best].exp() / score[best].exp().sum()
        y[i] = y[i] + method.alpha * sum(
            w * (t["A"][r] @ row) * t["B"][:, r] for w, r in zip(weight, best, strict=True)
        )
    return y
