"""Starts of virtual tokens: embeddings of a text, of chosen tokens, or of random ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft.core.affine import StartOp
from weft.core.site import Site

__all__ = ["answer_counts", "check_start", "start_ids", "start_tokens"]


def check_start(method: Any, site: Site) -> None:
    """ValueError for `init_text` and `init_ids` that cannot both be, or ids that the vocabulary does not have."""
    if method.init_text is not None and method.init_ids is not None:
        raise ValueError("init_text and init_ids both say what to start from; give one")
    if method.init_ids is not None and not all(0 <= i < site.in_features for i in method.init_ids):
        raise ValueError(f"init_ids={method.init_ids}: the vocabulary has ids 0 to {site.in_features - 1}")


def start_ids(method: Any, site: Site, op: StartOp, num: int) -> list[int]:
    """The token ids that `init_text` or `init_ids` of a method name, or `num` random ones; any on the meta device."""
    if method.init_ids is None and torch.device(site.device).type == "meta":
        return [0] * num
    if method.init_ids is None and method.init_text is None:
        drawn = site.uniform(num, bound=0.5).add(0.5).mul(site.in_features).long().clamp(max=site.in_features - 1)
        return [int(i) for i in drawn.tolist()]
    ids = list(method.init_ids) if method.init_ids is not None else op.token_ids(method.init_text)
    if not ids:
        raise ValueError(f"init_text={method.init_text!r} has no tokens to start from")
    return ids


def start_tokens(method: Any, site: Site, op: StartOp, num: int) -> Tensor:
    """Rows [num, C]: embeddings of the named tokens, repeated or cut to fit; or random ones, or Gaussian (`start`)."""
    if method.init_text is None and method.init_ids is None and method.start == "normal":
        return site.normal(num, site.out_features)
    rows = torch.tensor((start_ids(method, site, op, num) * num)[:num], device=site.device)
    return op.weight().mT[rows].clone()


def answer_counts(types: Sequence[int], decay: float) -> list[float]:
    """What a loss on each token of a context counts: those of type 4, 8, ... are answers, each of them decay^j in all.

    j counts from the last answer, which has 1: what the input is to be answered with comes after it.
    """
    answers = sorted({k for k in types if k > 0 and k % 4 == 0}, reverse=True)
    return [decay ** (1 + answers.index(k)) / types.count(k) if k in answers else 0.0 for k in types]
