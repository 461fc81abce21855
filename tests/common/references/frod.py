"""FRoD, densely: W written out in the shared basis, its scales moved and its directions mixed."""

import torch

from tests.common.references import apply

SMALL = [{"sparse_rate": 0.2}, {"sparse_rate": 0.1, "ridge": 0.1, "dropout": 0.3, "places_seed": 3}]
FROZEN = {f"{k}/{site}" for k in ("V", "V_inverse") for site in ("site/8", "site/12", "other/12")}


def dense(method, t, W, b, x):
    ((_, V),) = ((k, v) for k, v in t.items() if k.startswith("V/") and k.endswith(f"/{W.shape[1]}"))
    ((_, places),) = ((k, v) for k, v in t.items() if k.startswith("places/") and k.endswith(f"/{W.shape[1]}"))
    U = torch.linalg.solve(V, W.T).T
    scales = U.norm(dim=0)
    U = U * (scales > 1e-6).to(U) / scales.clamp(min=1e-6)
    middle = torch.diag(scales + t["d"])
    for (i, j), value in zip(places.T.tolist(), t["s"], strict=True):
        assert i != j
        middle[i, j] += value
    return apply(U @ middle @ V.T, b, x)
