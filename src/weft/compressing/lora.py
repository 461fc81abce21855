"""An adapter of any method that a weight can express, as LoRA."""

from __future__ import annotations

import torch
from torch import nn

from weft.attach import detach, records
from weft.combining import combine
from weft.compressing.measure import lost
from weft.compressing.ranks import EXACT
from weft.errors import AdapterError

__all__ = ["to_lora"]


@torch.no_grad()
def to_lora(
    model: nn.Module, source: str, *, name: str, rank: int | None = None, loss: float | None = None
) -> dict[str, float]:
    """Put a LoRA on a model that does what another of its adapters does; what is lost of its change, by address.

    rank: of the LoRA at every site. loss: instead, the smallest rank at each site that loses at most this share of the
        change's norm. By default the smallest that loses nothing but rounding.
    Raises AdapterError, and leaves the model as it was, where no LoRA does what the adapter does: where no weight
    does, or where it changes a norm or a bias.
    """
    parent = records(model)[source].plan
    made = combine(model, [source], name=name, rank=rank, loss=EXACT if rank is None and loss is None else loss)
    whole = [s.site for s in made.plan.sites if s.method.name != "lora"]
    if whole:
        detach(model, name)
        what = "a norm" if whole[0].kind == "norm" else "a bias"
        raise AdapterError(
            f"{whole[0].address}: {parent.method.name} changes {what} here, and LoRA adds to weights only; "
            f"{len(whole)} of {len(made.plan.sites)} sites are so"
        )
    return lost(model, source, name)
