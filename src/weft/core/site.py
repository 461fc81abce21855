"""A site: the place in a model where a method is attached, described by shapes only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Site:
    """Shape of one frozen map, and how to make tensors for it.

    A method sees every map in one orientation: `out_features` x `in_features` (x `kernel_size`), whatever the module
    stores. `kind` says how the module is used (linear, conv, embedding, experts, norm, block, ...). At a site of fused
    experts a method is initialised once per expert and never sees the expert dimension.

    address: where the site is, as the model names it (`model.layers.0.mlp.up_proj`).
    mixes_tokens: at a block, whether names in it say that tokens see each other there (an attention, a convolution).
    has_queries: at an attention, whether its queries can be computed again for hidden states of a method.
    index, count: position among the sites of this adapter, and how many there are; for `init` and penalties. The site
        of an op is shared by all adapters there, so a body that needs them saves them.
    layer: number of the layer that holds it, if the address has one.
    num_layers: at the end of a backbone, how many layers come before.
    """

    address: str
    kind: str
    out_features: int
    in_features: int
    kernel_size: tuple[int, ...] = ()
    groups: int = 1
    experts: int | None = None
    has_bias: bool = False
    has_queries: bool = False
    mixes_tokens: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    index: int = 0
    count: int = 1
    layer: int | None = None
    num_layers: int = 0
    seed: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as methods see it: [O, I / groups, *kernel]."""
        return (self.out_features, self.in_features // self.groups, *self.kernel_size)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=self.dtype, device=self.device)

    def normal(self, *shape: int, std: float = 1.0, salt: str = "") -> Tensor:
        """Gaussian draw, a function of the adapter's seed and this site's address (and `salt`) only."""
        return self._empty(shape).normal_(0, std, generator=self.generator(f"{shape}{salt}"))

    def uniform(self, *shape: int, bound: float, salt: str = "") -> Tensor:
        """Uniform draw in [-bound, bound], a function of the seed and the address only.

        salt: tells two draws of one shape apart; without it they are equal.
        """
        return self._empty(shape).uniform_(-bound, bound, generator=self.generator(f"{shape}{salt}"))

    def generator(self, salt: object = "") -> torch.Generator | None:
        """A generator on this site's device, seeded by (seed, address, salt); None on the meta device."""
        device = torch.device(self.device)
        if device.type == "meta":
            return None
        digest = hashlib.blake2b(f"{self.seed}/{self.address}/{salt}".encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)
