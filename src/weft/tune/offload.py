"""Activations in the host's memory: copied there when they are saved, and back when the backward asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from weft.errors import WeftError

__all__ = ["check_offload", "offloading"]

_LEAST_BYTES = 2**16  # smaller ones cost more to move than they take


def check_offload(device: torch.device) -> None:
    """Raise WeftError where there is no other memory to move to."""
    if device.type == "cpu":
        raise WeftError(
            "train.offload_activations: the model is on the CPU, whose memory is the host's already; set it to false, "
            "and use train.activations or train.activation_budget to keep less"
        )


@dataclass(frozen=True)
class _Parked:
    """A tensor in the host's memory, and where it belongs."""

    host: Tensor
    device: torch.device


@contextmanager
def offloading(device: torch.device, *, least_bytes: int = _LEAST_BYTES) -> Iterator[None]:
    """What the forward inside the `with` saves on `device` is held by the host, each tensor once.

    Weights stay, and so does what is smaller than `least_bytes`. Copies run on the compute stream from and to pinned
    memory, so no synchronisation is needed: a tensor's memory is reused only by what is queued after its copy.
    """
    parked: dict[tuple[object, ...], tuple[StorageWeakRef, _Parked]] = {}

    def pack(tensor: Tensor) -> Tensor | _Parked:
        if not _moves(tensor, device, least_bytes):
            return tensor
        storage = tensor.untyped_storage()
        view = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        key = (storage.data_ptr(), *view, tensor._version)
        known = parked.get(key)
        if known is not None and not known[0].expired():
            return known[1]
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        host.copy_(tensor, non_blocking=True)
        parked[key] = StorageWeakRef(storage), _Parked(host, tensor.device)
        return parked[key][1]

    hooks: Callable[..., object] = torch.autograd.graph.saved_tensors_hooks
    with hooks(pack, _back):  # type: ignore[attr-defined]
        yield
    parked.clear()


def _moves(tensor: Tensor, device: torch.device, least_bytes: int) -> bool:
    if tensor.device != device or type(tensor) is not Tensor:
        return False
    base = tensor._base if tensor._base is not None else tensor
    return not isinstance(base, nn.Parameter) and tensor.numel() * tensor.element_size() >= least_bytes


def _back(saved: Tensor | _Parked) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved.host.to(saved.device, non_blocking=True)
