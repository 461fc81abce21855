"""The memory levers of a recipe, put on a session's model before it learns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from weft.data import Batch
from weft.recipe.sizes import parse_bytes
from weft.tune.activations import Chosen, fit, set_activations
from weft.tune.evaluate import autocast, pad_token
from weft.tune.offload import check_offload
from weft.tune.packing import packed_attention
from weft.tune.parts import micro_batches
from weft.tune.session import Session
from weft.tune.step import LossOf
from weft.units import readable_bytes

__all__ = ["largest_batch", "set_levers"]


def set_levers(session: Session, loss_of: LossOf) -> list[str]:
    """Decide what is kept, recomputed or moved away; what a user should know of it. WeftError where it cannot be."""
    settings, model = session.recipe.train, session.model
    if settings.offload_activations:
        check_offload(session.device)
    if settings.activation_budget is None:
        if settings.activations != "keep":
            set_activations(model, settings.activations)
        return []
    limit = parse_bytes(settings.activation_budget)
    batch = largest_batch(session)

    def forward() -> Any:
        with autocast(session.device, settings.precision):
            return loss_of(model, batch)

    training = model.training
    model.train()
    try:
        with torch.random.fork_rng(), packed_attention(model, session.packed_from):
            chosen = fit(model, forward, limit)
    finally:
        model.train(training)
    return [_said(chosen, limit, batch)]


def largest_batch(session: Session) -> Batch:
    """The longest rows of the training data as one batch: no batch of the run keeps more."""
    settings = session.recipe.train
    longest = sorted(session.splits.train.examples, key=lambda example: len(example.input_ids))
    parts = micro_batches(
        longest[-settings.batch_size :],
        size=settings.batch_size,
        pad_token=pad_token(session.tokenizer),
        packed_from=session.packed_from,
    )
    return max(parts, key=lambda part: part.input_ids.numel()).to(session.device)


def _said(chosen: Chosen, limit: int, batch: Batch) -> str:
    """The choice in one line."""
    counts: Sequence[tuple[str, int]] = Counter(chosen.choices).most_common()
    told = ", ".join(f"{count} {choice}" for choice, count in counts)
    return (
        f"activations: layers {told}: {readable_bytes(chosen.peak_bytes)} of {readable_bytes(limit)} at the peak of a "
        f"batch of {batch.num_tokens} tokens, for {chosen.seconds * 1000:.0f} ms of recomputing"
    )
