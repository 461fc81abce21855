"""Published laws of training, each a pure function, with where it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Fit", "fit_joint", "fit_rectified", "joint_loss", "rectified_loss", "step_law_batch", "step_law_rate"]

Points = Sequence[tuple[float, float]]
_ROUNDS = 12


def step_law_rate(num_parameters: float, num_tokens: float) -> float:
    """The best peak learning rate of AdamW, 1.79 N^-0.713 D^0.307.

    N: parameters without embeddings. D: tokens of the whole training. Found by 3,700 runs from scratch of 60M to 1B
    parameters on 2 to 100 billion tokens: a guide for training all weights, and none for adapters.
    Li et al. 2025 (Step Law), arXiv 2503.04715.
    """
    return 1.79 * num_parameters**-0.713 * num_tokens**0.307


def step_law_batch(num_tokens: float) -> float:
    """The best batch in tokens, 0.58 D^0.571; holds where `step_law_rate` does."""
    return 0.58 * num_tokens**0.571


def joint_loss(x: float, num_rows: float, *, a: float, alpha: float, beta: float, e: float) -> float:
    """L = A / (X^alpha D^beta) + E, with X the size of the model, of its pretraining, or of the adapter.

    Holds for fine-tuning in which the model is much larger than the data. Zhang et al. 2024, arXiv 2402.17193.
    """
    return a / (x**alpha * num_rows**beta) + e


def rectified_loss(num_rows: float, *, b: float, d: float, beta: float, e: float) -> float:
    """L = B / (D_l + D^beta) + E: D_l is what pretraining has learnt of the task already.

    Lin et al. 2024 (rectified scaling law), arXiv 2402.02314.
    """
    return b / (d + num_rows**beta) + e


@dataclass(frozen=True)
class Fit:
    """A fitted law: its constants, its largest relative error on the points, and its prediction where it was asked.

    low, high: predictions of the fits that leave out one point each.
    """

    constants: dict[str, float]
    error: float
    prediction: float
    low: float
    high: float


def fit_rectified(points: Points, *, at: float) -> Fit:
    """The rectified law through (rows, loss), and its prediction at a number of rows.

    B and E follow from beta and D_l by least squares of relative errors, so these two are searched.
    """
    if len(points) < 4:
        raise ValueError(f"the rectified law has four constants, which {len(points)} points do not tell: give four")
    best = _rectified(points)
    others = [rectified_loss(at, **_rectified([p for p in points if p is not left])) for left in points[1:-1]]
    prediction = rectified_loss(at, **best)
    error = max(abs(rectified_loss(x, **best) / y - 1) for x, y in points)
    return Fit(best, error, prediction, min([prediction, *others]), max([prediction, *others]))


def fit_joint(points: Sequence[tuple[float, float, float]], *, at: tuple[float, float]) -> Fit:
    """The joint law through (X, rows, loss), and its prediction at (X, rows). Needs four points.

    Given E, the law is a plane in logarithms; E is searched below the smallest loss.
    """
    if len(points) < 4:
        raise ValueError(f"the joint law has four constants, which {len(points)} points do not tell: give four")
    best = _joint(points)
    others = [joint_loss(*at, **_joint([p for p in points if p is not left])) for left in points]
    prediction = joint_loss(*at, **best)
    error = max(abs(joint_loss(x, d, **best) / y - 1) for x, d, y in points)
    return Fit(best, error, prediction, min([prediction, *others]), max([prediction, *others]))


def _rectified(points: Points) -> dict[str, float]:
    rows = np.array([p[0] for p in points], dtype=float)
    losses = np.array([p[1] for p in points], dtype=float)
    best: tuple[float, dict[str, float]] = (math.inf, {})
    (centre, share), (width, wide) = (0.6, 0.0), (0.58, 4.0)
    for _ in range(_ROUNDS):  # each search looks closer around the best of the one before
        betas = np.linspace(max(centre - width, 0.02), min(centre + width, 1.5), 17)
        shares = np.linspace(share - wide, share + wide, 17)
        beta, part = (grid.ravel() for grid in np.meshgrid(betas, shares))
        d = rows.min() ** beta * 10.0**part  # D_l, as a share of the fewest rows to the power of beta
        errors, b, e = _lines(1 / (d[:, None] + rows ** beta[:, None]), losses)
        k = int(errors.argmin())
        if errors[k] < best[0]:
            found = {"b": b[k], "d": d[k], "beta": beta[k], "e": e[k]}
            best = float(errors[k]), {name: float(value) for name, value in found.items()}
            centre, share = float(beta[k]), float(part[k])
        width, wide = width / 2, wide / 2
    return best[1]


def _lines(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y = b x + e with b >= 0 and e >= 0, for every row of x: the mean squares of the relative errors, b and e."""
    u, v = x / y, 1 / np.broadcast_to(y, x.shape)
    uu, uv, vv = (u * u).sum(1), (u * v).sum(1), (v * v).sum(1)
    su, sv = u.sum(1), v.sum(1)
    det = uu * vv - uv * uv
    det = np.where(det <= 0, np.inf, det)
    b, e = (su * vv - sv * uv) / det, (sv * uu - su * uv) / det
    flat, bare = (b < 0) | np.isinf(det), e < 0
    b, e = np.where(bare, su / uu, b), np.where(bare, 0.0, e)
    b, e = np.where(flat, 0.0, b), np.where(flat, sv / vv, e)
    return ((b[:, None] * u + e[:, None] * v - 1) ** 2).mean(1), b, e


def _joint(points: Sequence[tuple[float, float, float]]) -> dict[str, float]:
    x, rows, losses = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    columns = np.stack([np.ones_like(x), -np.log(x), -np.log(rows)], 1)
    best: tuple[float, dict[str, float]] = (math.inf, {})
    for share in np.concatenate([np.linspace(0, 0.99, 100), 1 - np.logspace(-2, -5, 20)]):
        e = float(share * losses.min())
        (log_a, alpha, beta), *_ = np.linalg.lstsq(columns, np.log(losses - e), rcond=None)
        found = {"a": math.exp(log_a), "alpha": float(alpha), "beta": float(beta), "e": e}
        wrong = float(np.mean([(joint_loss(*p[:2], **found) / p[2] - 1) ** 2 for p in points]))
        if wrong < best[0]:
            best = wrong, found
    return best[1]
