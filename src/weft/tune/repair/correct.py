"""INT2.1's correction: the adapter first learns to make the quantised base answer as it did in full precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from weft.attach import parameters, using
from weft.errors import WeftError
from weft.quantise import Originals

__all__ = ["correct"]


def correct(
    model: nn.Module, name: str, originals: Originals, batches: Sequence[Mapping[str, Tensor]], *, steps: int,
    learning_rate: float = 1e-3,
) -> list[float]:  # fmt: skip
    """Train an adapter against the full-precision base for `steps` batches; the loss before every step.

    The loss is the mean over tokens of KL(full || quantised with the adapter). Chai et al. 2023, arXiv 2306.08162.
    """
    if not originals:
        raise WeftError(
            "train.correct_steps: the base before quantising is not at hand; it needs a base in full precision that "
            "Weft quantises itself (base.quantize)"
        )
    trained = [p for p in parameters(model, name) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    losses: list[float] = []
    model.eval()
    for batch in islice(cycle(batches), steps):
        loss = _distance(model, name, originals, batch)
        losses.append(loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _distance(model: nn.Module, name: str, originals: Originals, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad(), originals.restored(model), using(model, None):
        full = _rows(model, batch)
    with using(model, name):
        ours = _rows(model, batch)
    return (full.exp() * (full - ours)).sum(-1).mean()


def _rows(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probabilities of every token that counts, [tokens, V]."""
    result: Any = model(**{k: v for k, v in batch.items() if k != "labels"})
    logits = result if isinstance(result, Tensor) else result.logits
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == logits.shape[:-1]:
        logits = logits[mask.bool()]
    return logits.float().log_softmax(-1).flatten(0, -2)
