"""Counting what a forward keeps for its backward, layer by layer, without keeping it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Kept", "kept_bytes"]


@dataclass(frozen=True)
class Kept:
    """Bytes kept for the backward, weights aside: in each of the layers that were watched, and outside of them."""

    layers: tuple[int, ...]
    outside: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.layers) + self.outside


def kept_bytes(model: nn.Module, forward: Callable[[], Any], *, layers: Sequence[nn.Module] = ()) -> Kept:
    """What `forward` (a call of the model) saves for a backward; each storage counts once, outside if layers share it.

    Nothing is held: what would be saved is let go at once, so that this takes the memory of inference, and what
    `forward` returns cannot be differentiated.
    """
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, tuple[StorageWeakRef, int]] = {}
    outside = len(layers)
    counts = [0] * (outside + 1)
    place = [outside]

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer in weights:
            return
        now, known = place[0], seen.get(pointer)
        if known is not None and not known[0].expired():  # else another one lies there now
            if known[1] == now:
                return
            counts[known[1]] -= storage.nbytes()
            now = outside
        counts[now] += storage.nbytes()
        seen[pointer] = StorageWeakRef(storage), now

    def enter(index: int) -> Callable[..., None]:
        return lambda *_: place.append(place[0]) or place.__setitem__(0, index)  # type: ignore[func-returns-value]

    def leave(*_: Any) -> None:
        place[0] = place.pop()

    handles = [layer.register_forward_pre_hook(enter(i)) for i, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, _gone):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return Kept(tuple(counts[:-1]), counts[-1])


def _gone(_: None) -> NoReturn:
    raise AssertionError("what was only counted cannot be differentiated")
