"""A first estimate of a run's memory: counted where possible, measured on a short forward where not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weft import objectives
from weft.attach import parameters
from weft.data import Example, collate
from weft.tune.activations import keep_activations, recompute_activations
from weft.tune.evaluate import autocast, device_of
from weft.tune.machine import readable_bytes
from weft.tune.optimizers import state_tensors

if TYPE_CHECKING:
    from weft.recipe import Train

__all__ = ["Estimate", "estimate"]

_PROBE_TOKENS = 128  # rows are at most this long in the probe; longer ones are extrapolated


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a training step; what the process itself and its libraries take comes on top."""

    weights_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    num_tokens: int
    """Tokens of the batch that the activations were estimated for: its rows as long as the longest."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return (
            self.weights_bytes + self.adapter_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes
        )

    def __str__(self) -> str:
        rows = [
            ("base weights", self.weights_bytes),
            ("adapter", self.adapter_bytes),
            ("gradients", self.gradient_bytes),
            ("optimiser", self.optimizer_bytes),
            (f"activations of {self.num_tokens} tokens", self.activation_bytes),
            ("in all, at most", self.total_bytes),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"  {name.ljust(width)}  {readable_bytes(count):>10}" for name, count in rows]
        return "\n".join(["memory (first estimate, without the process itself):", *lines])


def estimate(
    model: nn.Module, examples: Sequence[Example], train: Train, *, task: str, pad_token: int, name: str | None = None
) -> Estimate:
    """What one step needs on a model that the adapter `name` is attached to; the model is left as it was.

    The activations are what a forward of the longest row really keeps for the backward, times the rows of a batch;
    rows of more than 128 tokens are extrapolated from two short ones by a T + b T^2.
    """
    trained = parameters(model, name)
    adapter = sum(p.numel() * p.element_size() for p in trained)
    own = {id(p) for p in trained}
    weights = sum(
        t.untyped_storage().nbytes()
        for t in {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if id(t) not in own}.values()
    )
    longest = max(examples, key=lambda example: len(example.input_ids))
    row = _row_bytes(model, longest, train, task=task, pad_token=pad_token)
    if train.gradient_checkpointing:
        recompute_activations(model)
        try:
            inputs = _row_bytes(model, longest, train, task=task, pad_token=pad_token)
        finally:
            keep_activations(model)
        row = inputs + max(row - inputs, 0.0) / _num_layers(model)  # one layer at a time is recomputed in full
    length = len(longest.input_ids)
    return Estimate(
        weights_bytes=weights,
        adapter_bytes=adapter,
        gradient_bytes=adapter,
        optimizer_bytes=adapter * state_tensors[train.optimizer],
        activation_bytes=round(row * train.batch_size),
        num_tokens=length * train.batch_size,
    )


def _row_bytes(model: nn.Module, longest: Example, train: Train, *, task: str, pad_token: int) -> float:
    """What one row of the longest length keeps for the backward."""
    length = len(longest.input_ids)

    def kept(num_tokens: int) -> int:
        return _kept_bytes(model, _cut(longest, num_tokens), train, task=task, pad_token=pad_token)

    if length <= _PROBE_TOKENS:
        return kept(length)
    half, whole = kept(_PROBE_TOKENS // 2), kept(_PROBE_TOKENS)
    curve = max((whole - 2 * half) / (_PROBE_TOKENS**2 / 2), 0.0)  # b, from a T + b T^2 at both lengths
    return (whole / _PROBE_TOKENS - curve * _PROBE_TOKENS) * length + curve * length**2


def _num_layers(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    return int(getattr(config.get_text_config(), "num_hidden_layers", 1)) if config is not None else 1


def _cut(example: Example, num_tokens: int) -> Example:
    labels = example.labels
    if not isinstance(labels, int):
        # the end of the row: there its trained tokens stand, which cost most
        labels = labels[-num_tokens:]
    return Example(example.input_ids[-num_tokens:], labels, example.file, example.line)


def _kept_bytes(model: nn.Module, example: Example, train: Train, *, task: str, pad_token: int) -> int:
    """Bytes that the forward of one row keeps for its backward, weights aside."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights:
            storages[pointer] = tensor  # held, so that no other tensor gets its place
        return tensor

    device = device_of(model)
    batch = collate([example], pad_token=pad_token).to(device)
    state, was_training = torch.get_rng_state(), model.training
    model.train()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(device, train.precision):
            loss, _, _ = objectives.get(task).loss(model, batch)
    finally:
        model.train(was_training)
        torch.set_rng_state(state)
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
