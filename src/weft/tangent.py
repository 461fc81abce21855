"""Adapters composed to first order: what each changes adds up exactly, and what one added can be taken away again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from weft.attach import records, using, weave_of
from weft.differences import difference
from weft.errors import AdapterError, nearest
from weft.kinds.seat import Seat

__all__ = ["tangent"]


def tangent(
    model: nn.Module, adapters: Mapping[str, float], *, learn: bool = False
) -> Callable[[Mapping[str, Any]], Tensor]:
    """A model with several adapters to first order: x -> f(x; W) + sum_k w_k <df(x; W) / dW, D_k>.

    D_k is what adapter k changes of the weights W. All of it takes one pass that carries a derivative along (Jacobian
    times vector), whatever the number of adapters; the logits are linear in the w_k. Liu and Soatto 2023 (tangent model
    composition), arXiv 2307.08114, who train the D_k in this form too.

    adapters: {name: weight}. learn: to train them in this form: the changes are those of the moment of each call, and
        gradients flow to the adapters' tensors. Logits are linear in a change, so in what is trained where the change
        is (`full`, `bias_tuning`), and not where it is a product (`lora`).
    The function takes the model's inputs by name and returns logits, with the weights W of that moment. Raises
    AdapterError for an adapter that is not there or that no weight can express, and for a module that does not hold its
    weight as numbers that could be moved.
    """
    known = records(model)
    for name in adapters:
        if name not in known:
            raise AdapterError(
                f"this model has no adapter {name!r}; {nearest(name, known) if known else 'it has none'}"
            )
    if learn:
        return lambda inputs: _first_order(model, _changes(model, adapters, graph=True), inputs)
    changes = _changes(model, adapters, graph=False)
    return torch.no_grad()(lambda inputs: _first_order(model, changes, inputs))


def _changes(model: nn.Module, adapters: Mapping[str, float], *, graph: bool) -> dict[str, Tensor]:
    """What the adapters change together, by parameter."""
    names = {id(p): key for key, p in model.named_parameters(remove_duplicate=False)}
    changes: dict[str, Tensor] = {}
    for address, seat in weave_of(model).seats.items():
        for name in adapters:
            if name in seat.adapters:
                d = difference(seat, name, graph=graph)
                for param, change in ((seat.param, seat.oriented(d.weight())), (seat.bias_param, d.shift)):
                    if change is not None:
                        key = names[id(_held(seat, param, change, address))]
                        changes[key] = changes.get(key, torch.zeros_like(change)) + adapters[name] * change
    return changes


def _held(seat: Seat, param: str, change: Tensor, address: str) -> Tensor:
    """The parameter that a change is added to."""
    held = seat.module._parameters.get(param)
    if held is None or not held.is_floating_point() or held.shape != change.shape:
        raise AdapterError(
            f"{address} does not hold its {param} as numbers that could be moved: use its base unquantised"
        )
    return held


def _first_order(model: nn.Module, changes: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Tensor:
    weights = dict(model.named_parameters(remove_duplicate=False))

    def logits(moved: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, moved, (), dict(inputs)).logits

    here = {key: weights[key].detach() for key in changes}
    there = {key: change.to(here[key].dtype) for key, change in changes.items()}
    with using(model, None), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # The fused attention kernels carry no derivative along. torch 2.13 scripts its own rules on the first use.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
        value, slope = torch.func.jvp(logits, (here,), (there,))[:2]
    found: Tensor = value + slope
    return found
