"""Every random state of a process: seeded at the start of a run, kept in its checkpoints, put back on resume."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["random_states", "restore_random_states", "seed_everything"]


def seed_everything(seed: int) -> None:
    """Start Python's, numpy's and torch's generators (those of all devices) from one seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  libraries below draw from the legacy state
    torch.manual_seed(seed)


def random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states as tensors and as plain values for JSON."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors.update({f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    version, words, gauss_next = random.getstate()
    plain = {
        "python": [version, list(words), gauss_next],
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
    }
    return tensors, plain


def restore_random_states(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """The inverse of `random_states`; states of devices that are not here are left out."""
    version, words, gauss_next = plain["python"]
    random.setstate((version, tuple(words), gauss_next))
    kind, keys, position, has_gauss, gauss = plain["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(tensors["torch"])
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(num_devices):
        if f"cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
