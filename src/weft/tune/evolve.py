"""Methods that change their own tensors between steps: called after every optimiser step, their memory kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weft.attach import records
from weft.core import Method, Part, Progress
from weft.errors import WeftError
from weft.optim import ZerothOrder
from weft.tune.checkpoint import CheckpointError

if TYPE_CHECKING:
    from weft.recipe import Train

__all__ = ["Evolution", "evolution_of"]

_FOREIGN = {
    "optimizer_in_backward": "the gradients that it looks at are gone after the backward",
    "adapter_bits": "what it writes would be overwritten from the tensors of full precision",
    "master_weights": "what it writes would be overwritten from the float32 copies",
}


class Evolution:
    """The parts of an adapter whose methods evolve, and what these remember between steps.

    overflows: gradients may be infinite (float16). The optimiser then leaves a step out, and so do the methods.
    """

    def __init__(self, parts: Mapping[Method, Sequence[Part]], num_steps: int, *, overflows: bool = False):
        self.parts, self.num_steps, self.overflows = parts, num_steps, overflows

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        """`step` optimiser steps are done."""
        if self.overflows and not all(bool(g.isfinite().all()) for g in self._gradients()):
            return
        for method, parts in self.parts.items():
            method.evolve(parts, Progress(step, self.num_steps))

    def state(self) -> dict[str, Tensor]:
        """What the methods remember, by name, for a checkpoint."""
        return {f"{name}/{key}": t for name, part in self._named() for key, t in part.state.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Give the methods back what they remembered; CheckpointError for another run's."""
        places = dict(self._named())
        for part in places.values():
            part.state.clear()
        for key, tensor in state.items():
            name, _, inner = key.rpartition("/")
            if name not in places:
                raise CheckpointError(f"the checkpoint remembers something of {name}, which this recipe does not adapt")
            places[name].state[inner] = tensor.to(next(iter(places[name].tensors.values())).device)
        for part in places.values():
            part.hold_frozen()

    def _gradients(self) -> list[Tensor]:
        every = (t.grad for _, part in self._named() for t in part.tensors.values())
        return [g for g in every if g is not None]

    def _named(self) -> list[tuple[str, Part]]:
        return [(f"{m.name}/{p.site.address}", p) for m, parts in self.parts.items() for p in parts]


def evolution_of(
    model: nn.Module, name: str, optimizer: torch.optim.Optimizer, settings: Train, *, num_steps: int
) -> Evolution | None:
    """What changes tensors between the steps of an adapter's training, or None; WeftError where a key forbids it."""
    parts: dict[Method, list[Part]] = {}
    for adapter in records(model)[name].adapters.values():
        if not adapter.method.evolves():
            continue
        tensors = {**dict(adapter.named_parameters(recurse=False)), **dict(adapter.named_buffers(recurse=False))}
        part = Part(adapter.site, tensors, {}, _restart(optimizer, tensors))
        parts.setdefault(adapter.method, []).append(part)
    if not parts:
        return None
    named = ", ".join(m.name for m in parts)
    for key, why in _FOREIGN.items():
        if getattr(settings, key):
            raise WeftError(f"train.{key}: {named} changes its own tensors between steps, and {why}; set it to false")
    if isinstance(optimizer, ZerothOrder):
        raise WeftError(
            f"train.optimizer {settings.optimizer!r}: {named} changes its own tensors between steps, by gradients that "
            "this optimizer does not make; choose one that uses gradients"
        )
    return Evolution(parts, num_steps, overflows=settings.precision == "float16")


def _restart(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> Callable[[str, Tensor | None], None]:
    def restart(name: str, where: Tensor | None) -> None:
        p = tensors[name]
        kept = [t for t in optimizer.state.get(p, {}).values() if isinstance(t, Tensor) and t.ndim]
        if where is None or any(t.shape != p.shape or not t.is_floating_point() for t in kept):
            optimizer.state.pop(p, None)  # all of it; or it is quantised or factored, so that entries are not apart
            return
        for t in kept:
            t.masked_fill_(where, 0)

    return restart
