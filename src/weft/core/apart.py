"""What keeps experts of a mixture apart and learning: a contrast of their outputs, and gradients by roots of gates."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.core.choices import unrecorded
from weft.core.experts import Experts
from weft.core.fused import value
from weft.core.method import Method, Tensors

__all__ = ["contrast", "mix_by_roots"]

_MOST = 64
"""Tokens of a batch that are contrasted: the loss compares every two of their outputs."""


def contrast(op: Experts, x: Tensor, gates: Tensor, temperature: float) -> Tensor:
    """How much outputs of one expert resemble those of others: the mean over outputs a of chosen experts, and over
    other outputs p of the same expert, of -log(exp(a.p / t) / sum_b exp(a.b / t)), b all others. Outputs are what an
    expert adds to a token, of length 1; tokens are taken evenly from the batch, and none from earlier batches (the
    paper keeps a queue of them).
    """
    rows, chosen = x.flatten(0, -2), gates.detach().ne(0).expand(*x.shape[:-1], -1).flatten(0, -2)  # [N, K]
    some = torch.arange(0, len(rows), max(-(-len(rows) // _MOST), 1), device=x.device)
    whole = op.site.kind != "linear" or any(method.conditions for method, _ in op.members)
    with unrecorded():
        changes = [value(c) for c in op.changes(x if whole else rows[some])]
    added = torch.stack([c.flatten(0, -2)[some] if whole else c for c in changes], 1).flatten(0, 1)  # [N K, O]
    added = added.to(torch.promote_types(added.dtype, torch.float32))
    length = added.norm(dim=-1, keepdim=True)
    which = torch.arange(len(changes), device=x.device).repeat(len(some))
    there = chosen[some].flatten() & length.squeeze(-1).detach().gt(1e-6)  # a fresh expert adds nothing yet
    unit = torch.where(there.unsqueeze(-1), added, 1.0) / torch.where(there.unsqueeze(-1), length, 1.0)
    other = there & ~torch.eye(len(which), dtype=torch.bool, device=x.device)
    score = (unit @ unit.mT / temperature).masked_fill(~other, -1e9)
    same = other & there.unsqueeze(-1) & which.eq(which.unsqueeze(-1))
    return -(score.log_softmax(-1) * same).sum() / same.sum().clamp_min(1)


def mix_by_roots(op: Experts, x: Tensor, gates: Tensor) -> Tensor:
    """`op.mix(x, gates)`, whose experts get gradients as if their gates were the roots of what they are.

    A step of B A that is preconditioned by its own factors alone is g^2 of what it should be where a gate g is in it
    once forward and once backward; with the root it is g.
    """
    roots = gates.detach().sqrt()
    still: list[tuple[Method, Tensors]] = [(method, {k: t.detach() for k, t in c.items()}) for method, c in op.members]
    fixed = x.detach()
    with unrecorded():
        y = value(op.mix(x, roots))
        members, op.members = op.members, still
        try:
            rest = value(op.mix(fixed, gates - roots)) - value(op.inner(fixed))
        finally:
            op.members = members
    op.note(x, gates)
    return y + rest
