"""Adapters that are learnt in few bits: steps see what will be written, and move what it was made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weft.compress import Gaussian, few_bits, through
from weft.errors import WeftError

if TYPE_CHECKING:
    from weft.recipe import Train
    from weft.tune.step import Learner

__all__ = ["FewBits"]

_KEY = "latent"
"""Where an optimiser's state holds the tensor of full precision: with it, it is in every checkpoint."""


class FewBits:
    """Updates of matrices that are in few bits at all other times: in forwards, measurements, and when written.

    The update meets the tensor of full precision, and the gradient that passes straight through its centroids.
    Jie et al. 2023, arXiv 2307.16867. WeftError when no matrix is trained.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        bits: int,
        optimizer: torch.optim.Optimizer,
        update: Callable[[Learner, Train], float],
    ):
        self.bits, self.optimizer, self.inner = bits, optimizer, update
        self.parameters = {name: p for name, p in parameters.items() if p.ndim > 1}
        if not self.parameters:
            raise WeftError(
                "train.adapter_bits is for matrices, of which a row has one scale, and this method trains vectors "
                "only; set it to null"
            )
        self._first = {name: p.detach().clone() for name, p in self.parameters.items()}
        for p in self.parameters.values():
            self._show(p, p)

    def update(self, learner: Learner, settings: Train) -> float:
        """The wrapped update, of the tensors of full precision; the norm of their gradient."""
        swapped: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for name, p in self.parameters.items():
                if p.grad is not None:
                    latent = self._latent(name, p)
                    self.optimizer.state[p].pop(_KEY, None)  # an optimiser makes its state when it finds it empty
                    p.grad = through(latent, p.grad, bits=self.bits)
                    swapped.append((p, p.data))
                    p.data = latent
            return self.inner(learner, settings)
        finally:
            for p, shown in swapped:
                latent, p.data = p.data, shown
                self.optimizer.state[p][_KEY] = latent
                self._show(p, latent)

    def codes(self) -> dict[str, Gaussian]:
        """The tensors in use, by name, as they are written."""
        return {name: few_bits(self._latent(name, p), bits=self.bits) for name, p in self.parameters.items()}

    def _latent(self, name: str, p: nn.Parameter) -> Tensor:
        """Of full precision: the optimiser's own where a step was made, in this run or the one that it goes on from."""
        found: Tensor = self.optimizer.state.get(p, {}).get(_KEY, self._first[name])
        return found

    @torch.no_grad()
    def _show(self, p: nn.Parameter, latent: Tensor) -> None:
        p.copy_(few_bits(latent, bits=self.bits).tensor())
