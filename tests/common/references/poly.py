"""Polytropon and multi-head routing, densely, with a fixed task: block by block."""

import torch

from tests.common.references import apply

SMALL = [
    {"rank": 2, "num_skills": 3, "num_tasks": 2, "task": 1},
    {"rank": 1, "num_skills": 2, "num_splits": 4, "num_tasks": 3, "task": 0, "alpha": 3.0},
    {"rank": 2, "num_skills": 2, "num_splits": 2, "routing": "mean", "order": 2},
]


def dense(method, t, W, b, x):
    S, R, Q = method.num_skills, method.rank, method.num_splits
    rows = {"A": W.shape[1] // Q, "B": W.shape[0] // Q}
    found = {"A": [], "B": []}
    for q in range(Q):
        if method.routing == "mean":
            g = torch.ones(S, dtype=x.dtype) / S
        else:
            g = 1 / (1 + torch.exp(-t["Z"][method.task, q]))
            g = g / g.sum()
        for name, size in rows.items():
            mean = 0
            for s in range(S):
                each = []
                for r in range(s * R, (s + 1) * R):
                    row = t[name][0, q, r]
                    for n in range(1, method.order):
                        row = torch.kron(row, t[name][n, q, r])
                    each.append(row[:size])
                mean = mean + g[s] * torch.stack(each)
            found[name].append(mean)
    A, B = torch.cat(found["A"], 1), torch.cat(found["B"], 1).T
    return apply(W + method.alpha / R * B @ A, b, x)
