"""A routed mixture of LoRAs, densely."""

from tests.common.references import apply

SMALL = [{"num_experts": 3, "rank": 2}, {"num_experts": 3, "rank": 2, "top_k": 2, "dropout": 0.3}]


def dense(method, t, W, b, x):
    E, k = method.num_experts, method.top_k
    weight = (x @ t["G"].T).exp()  # [N, E]
    if k is not None:
        weight = weight * (weight >= weight.sort(-1, descending=True).values[..., k - 1 : k])
    gate = weight / weight.sum(-1, keepdim=True)
    y = apply(W, b, x)
    for e, (A, B) in enumerate(zip(t["A"].chunk(E), t["B"].chunk(E, dim=1), strict=True)):
        y = y + method.alpha / method.rank * gate[..., e : e + 1] * (x @ A.T @ B.T)
    return y
