"""The probe after the act: every adapted module must really be used, or the adapter there would do nothing."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from weft.core.route import names
from weft.kinds.seat import Seat, Weave, WovenWeight

CACHES = ("past_key_values", "cache_params")
"""Arguments that a forward writes to: it cannot be run again with them."""

Random = list[tuple[int | None, Tensor]]


class NeverCalled(RuntimeError):
    """An adapted module's forward does not run, though its weight is used."""


def can_repeat(kwargs: dict[str, Any]) -> bool:
    """Whether a forward with these arguments may be run a second time without its caches; ask before the first."""
    return all(_is_empty(kwargs.get(key)) for key in CACHES)


def random_states() -> Random:
    """The states of torch's generators: with them a forward draws the same numbers again."""
    states: Random = [(None, torch.get_rng_state())]
    if torch.cuda.is_initialized():
        states += [(i, torch.cuda.get_rng_state(i)) for i in range(torch.cuda.device_count())]
    return states


def check_used(
    model: nn.Module,
    weave: Weave,
    again: Callable[..., Any],
    random: Random,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Find adapted modules that did not run although their weight reaches the output; NeverCalled names them.

    A module that did not run may simply not have been needed (an expert that got no token). So the model runs once
    more, with a gradient wanted for the weights in question: one that gets a gradient is read by a neighbour.
    again: the forward that has just run; random: the states it started from.
    """
    asked = names(weave.route)
    silent = [weave.seats[a] for a in sorted(weave.unproved) if asked & weave.seats[a].adapters.keys()]
    slots = {s.site.address: slots for s in silent if (slots := _slots(s))}
    sharded = any(hasattr(m._parameters[p], "device_mesh") for each in slots.values() for m, p in each)
    if sharded or any(p.is_inference() for p in model.parameters()):
        return  # a second forward of one process would wait for the others; inference tensors take no gradient
    weave.unproved.difference_update([s.site.address for s in silent])
    if not slots:
        return
    before = set(weave.unproved)
    weave.unproved.update(slots)
    reached = _reached(model, slots, again, random, args, kwargs)
    called = slots.keys() - weave.unproved
    weave.unproved = before
    if reached | called:
        weave.unproved |= reached | called
        raise NeverCalled(_message([s for s in silent if s.site.address in reached | called]))


def _message(seats: list[Seat]) -> str:
    where = ", ".join(s.site.address for s in seats)
    said = f"{where}: its forward does not run, though its weight is used, so the adapter there would do nothing. "
    if any(isinstance(s.module, WovenWeight) for s in seats):
        return said + "Its owner keeps a reference of its own to the weight: detach the adapter and adapt other modules"
    if any(not s.has_weight for s in seats):
        return said + (
            "A fused path computes the block: detach the adapter and adapt the linear layers in it, or turn the fused "
            "path off (for torch's own layers: torch.backends.mha.set_fastpath_enabled(False))"
        )
    return (
        said
        + "A neighbour reads it: detach the adapter and attach it with through='weight', which adapts the weight itself"
    )


def _slots(seat: Seat) -> list[tuple[nn.Module, str]]:
    """The parameters, by owner and name, that reach the output only if something reads them past this seat."""
    if seat.has_weight:
        slots = [(seat.module, seat.param)] if seat.param in seat.module._parameters else []
    else:
        slots = [
            (m, p) for n, m in seat.module.named_modules() if "adapters" not in n.split(".") for p in m._parameters
        ]
    return [(m, p) for m, p in slots if (t := m._parameters[p]) is not None and t.is_floating_point()]


def _reached(
    model: nn.Module,
    slots: dict[str, list[tuple[nn.Module, str]]],
    again: Callable[..., Any],
    random: Random,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> set[str]:
    """The addresses of which some parameter has a path to the output."""
    kwargs = {k: None if k in CACHES else v for k, v in kwargs.items()}
    if kwargs.get("use_cache"):
        kwargs["use_cache"] = False
    with torch.inference_mode(False), torch.enable_grad(), _undisturbed(model, random), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first run has said it already
        args, kwargs = tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t.detach(), (args, kwargs))
        with _watched(model, [slot for each in slots.values() for slot in each]) as leaves:
            result = again(*args, **kwargs)
            total = sum(t.float().sum() for t in tensors(result) if t.requires_grad)
            if not isinstance(total, Tensor):
                return set()
            grads = torch.autograd.grad(total, [*leaves.values()], allow_unused=True)
    found = {key for key, g in zip(leaves, grads, strict=True) if g is not None}
    return {address for address, each in slots.items() if any((id(m), p) in found for m, p in each)}


@contextmanager
def _watched(model: nn.Module, slots: list[tuple[nn.Module, str]]) -> Iterator[dict[tuple[int, str], Tensor]]:
    """The parameters as leaves that take gradients: themselves, or a stand-in where that would mislead.

    A stand-in when other modules hold the same parameter (their reading of it is none of this module's), and for a
    quantised tensor, whose gradient torch does not pass on.
    """
    counts: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            counts[id(p)] = counts.get(id(p), 0) + 1
    leaves: dict[tuple[int, str], Tensor] = {}
    undo: list[Callable[[], Any]] = []
    try:
        for module, name in slots:
            old: Any = module._parameters[name]
            quantised = type(old).dequantize is not Tensor.dequantize
            if quantised or counts[id(old)] > 1:
                value = old.detach().dequantize() if quantised else old.detach()
                module._parameters[name] = nn.Parameter(value)
                undo.append(lambda m=module, n=name, o=old: m._parameters.__setitem__(n, o))  # type: ignore[misc]
            else:
                undo.append(lambda o=old, flag=old.requires_grad: o.requires_grad_(flag))  # type: ignore[misc]
                old.requires_grad_(True)
            leaves[id(module), name] = module._parameters[name]  # type: ignore[assignment]
        yield leaves
    finally:
        for step in reversed(undo):
            step()


@contextmanager
def _undisturbed(model: nn.Module, random: Random) -> Iterator[None]:
    """Run something that leaves no trace: random states, buffers and checkpointing flags come back."""
    after = random_states()
    buffers = [(m, n, b) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    _set_random(random)
    # copies take the writes: the first run may have saved the originals for its backward
    for module, name, buffer in buffers:
        module._buffers[name] = buffer.detach().clone()
    for module in checkpointed:  # a re-entrant checkpoint refuses torch.autograd.grad
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        _set_random(after)
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


def _set_random(states: Random) -> None:
    for device, state in states:
        if device is None:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def _is_empty(cache: Any) -> bool:
    if cache is None:
        return True
    length = getattr(cache, "get_seq_length", None)
    return length is not None and int(length()) == 0


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from tensors(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from tensors(getattr(tree, field.name))
