"""Cross entropy of a linear head in chunks, its gradient made on the way: logits of one chunk are all that is held.

A loss is the last thing that a forward computes, so its gradient with respect to the head's input is known as soon as
the logits are: it is kept in their place, which takes the width of the model and not of the vocabulary per token, and
the backward only multiplies it by what comes from outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.core.functions import times

__all__ = ["Shaping", "fused_losses", "losses_of"]

_HALF_MAX = 65504.0  # the largest float16


@dataclass(frozen=True)
class Shaping:
    """What a model does to its logits after the head: cap tanh(scale z / cap), or scale z where there is no cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """The logits that the loss reads, from what the head gives."""
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)

    def backward_(self, gradient: Tensor, shaped: Tensor) -> Tensor:
        """d loss / d z from d loss / d logits (overwritten) and the logits."""
        if self.cap is not None:
            gradient.mul_(1 - (shaped / self.cap).square())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


def losses_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(target) of each row of logits [N, V] in float32, and how many targets are the most likely one."""
    logits = logits.float()
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return loss, (logits.detach().argmax(-1) == targets).sum()


def fused_losses(
    hidden: Tensor,
    rows: Tensor,
    targets: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    shaping: Shaping,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The losses [N] of `rows` of hidden [M, C] under logits shaping(W h + b), and how many are right.

    rows: each at most once.
    weight [V, C] and bias [V] may be trained; then all losses must be given the same weight (as their sum does), since
    only the sum of their gradients is kept.
    """
    return _Fused.apply(hidden, rows, targets, weight, bias, shaping, chunk)


class _Fused(torch.autograd.Function):
    """Saved: d losses / d hidden of the rows [N, C], and the summed gradients of weight and bias where they train."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        rows: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shaping: Shaping,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4])
        made = _Made(hidden, len(rows), weight, bias, kind, wanted)
        losses = torch.empty(len(rows), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(rows), chunk):
                part = slice(start, start + chunk)
                losses[part], right = made.chunk(part, rows, targets, shaping)
                correct += right
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        ctx.save_for_backward(rows, made.of_rows, made.of_weight, made.of_bias)
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, of_hidden, of_weight, of_bias = ctx.saved_tensors
        whole = None
        if of_hidden is not None:
            whole = torch.zeros(ctx.shape, dtype=ctx.dtype, device=outer.device)
            whole.index_copy_(0, rows, (of_hidden * outer.unsqueeze(1)).to(ctx.dtype))
        if len(outer) and (of_weight is not None or of_bias is not None):
            if len(outer) > 1 and outer.stride() != (0,):  # not the gradient of a sum
                raise RuntimeError("the losses of a trained head are summed before anything else is done to them")
            of_weight = None if of_weight is None else of_weight * outer[0].to(of_weight.dtype)
            of_bias = None if of_bias is None else of_bias * outer[0].to(of_bias.dtype)
        return whole, None, None, of_weight, of_bias, None, None


class _Made:
    """The gradients that chunks add up to, for those of (hidden, weight, bias) that want one."""

    def __init__(
        self,
        hidden: Tensor,
        count: int,
        weight: Tensor,
        bias: Tensor | None,
        kind: torch.dtype,
        wanted: tuple[bool, bool, bool],
    ):
        self.hidden, self.kind, self.wanted = hidden, kind, any(wanted)
        self.weight, self.bias = weight.to(kind), None if bias is None else bias.to(kind)  # [V, C], [V]
        half = kind == torch.float16
        kept = torch.float32 if half else kind
        self.of_rows = hidden.new_empty(count, hidden.shape[1], dtype=kept) if wanted[0] else None  # [N, C]
        self.of_weight = torch.zeros_like(weight) if wanted[1] else None
        self.of_bias = torch.zeros_like(bias) if wanted[2] and bias is not None else None
        self.shift = _shift(weight) if half and wanted[0] else None

    def chunk(self, part: slice, rows: Tensor, targets: Tensor, shaping: Shaping) -> tuple[Tensor, Tensor]:
        """The losses of some rows, and how many are right; their gradients are added to what is kept."""
        targets = targets[part]
        x = self.hidden.index_select(0, rows[part]).to(self.kind)  # [n, C]
        logits = shaping(torch.nn.functional.linear(x, self.weight, self.bias).float())  # [n, V]
        top, index = logits.max(-1)
        share = logits.softmax(-1)  # [n, V]
        at = targets.unsqueeze(1)
        # log sum exp = top - log p(top), and p(top) is at least 1 / V
        losses = top - share.gather(1, index.unsqueeze(1)).squeeze(1).log() - logits.gather(1, at).squeeze(1)
        if self.wanted:
            share.scatter_add_(1, at, torch.full_like(share[:, :1], -1.0))
            self._add(part, shaping.backward_(share, logits), x)
        return losses, (index == targets).sum()

    def _add(self, part: slice, gradient: Tensor, x: Tensor) -> None:
        """gradient: of the head's output, [n, V]."""
        if self.of_bias is not None:
            self.of_bias += gradient.sum(0).to(self.of_bias.dtype)
        if self.of_weight is not None:
            self.of_weight += (gradient.to(self.kind).mT @ x).to(self.of_weight.dtype)
        if self.of_rows is None:
            return
        if self.shift is None:
            times(gradient.to(self.kind), self.weight, out=self.of_rows[part])
        else:  # small shares would fall below what float16 can hold
            self.of_rows[part] = ((gradient * self.shift).to(self.kind) @ self.weight).float() / self.shift


def _shift(weight: Tensor) -> Tensor:
    """A power of two that float16 shares can be multiplied by: |sum_v g_v W_v| is at most 2 max |W|."""
    largest = weight.abs().max().float().clamp(min=1e-6)
    return torch.exp2(torch.log2(_HALF_MAX / (4 * largest)).floor()).clamp(max=1024.0)
