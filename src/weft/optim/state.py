"""An optimiser's state: as named tensors and plain values for a checkpoint, back again, and how large it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from weft.optim.choice import Choice, Groups, Setting
from weft.optim.own import Own

__all__ = ["flatten_state", "held_bytes", "restore_state", "state_bytes", "state_tensors"]

_OBJECTS = {"GaLoreProjector": "pytorch_optimizer.optimizer.utils.galore"}
"""Classes of other packages that stand in a state, with the module that has them."""
_CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "deque": deque}
_NOT_STATE = frozenset({"params", "lr", "lr_scale", "weight_decay"})


def flatten_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as tensors named `<parameter>|<key>`, and whatever of it is not a tensor.

    Numbers that an optimiser keeps in its groups or on itself are named `group <i>|<key>` and `optimizer|<key>`.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            _write(f"{name}|{key}", value, tensors, plain)
    for place, held in _numbers(optimizer).items():
        for key, value in held.items():
            _write(f"{place}|{key}", value, tensors, plain)
    first: dict[int, str] = {}
    for key, value in list(tensors.items()):
        if (other := first.setdefault(id(value), key)) != key:  # one tensor in several places, as 8-bit code books are
            del tensors[key]
            plain[key] = {"kind": "same", "parts": other}
    return {key: value.detach() for key, value in tensors.items()}, plain


def restore_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Any],
) -> None:
    """The inverse of `flatten_state`, on an optimiser made for the same parameters."""
    kept = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    made: dict[str, Tensor] = {}
    for key in [*tensors, *plain]:
        place, _, field = key.rpartition("|")
        if "/" in field:
            continue  # a part of what stands under the shorter key
        if place == "optimizer":
            setattr(optimizer, field, _read(key, tensors, plain, None, made))
        elif place not in parameters:
            optimizer.param_groups[int(place.removeprefix("group "))][field] = _read(key, tensors, plain, None, made)
        else:
            parameter = parameters[place]
            group = kept[id(parameter)]
            # torch keeps a count of steps on the CPU unless its kernel reads it
            moves = field != "step" or group.get("fused") or group.get("capturable")
            value = _read(key, tensors, plain, parameter.device if moves else None, made)
            optimizer.state[parameter][field] = value
    if isinstance(optimizer, Own):
        optimizer.restored()


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimiser's state, each counted once."""
    found: dict[int, Tensor] = {}
    for state in optimizer.state.values():
        found.update({id(t): t for t in state_tensors(state)})
    return sum(t.numel() * t.element_size() for t in found.values())


def state_tensors(state: Mapping[str, Any]) -> list[Tensor]:
    """Every tensor in what an optimiser keeps for one parameter, in lists and objects too."""
    found: dict[str, Tensor] = {}
    _write("", dict(state), found, {})
    return list(found.values())


def state_bytes(choice: Choice, groups: Groups, setting: Setting) -> int:
    """What an optimiser keeps for these parameters once it has made a step; nothing of it is allocated.

    groups: as `Choice.make` takes them; the parameters may be on the meta device.
    """
    formula = choice.state_bytes(groups, setting)
    if formula is not None:
        return formula
    with FakeTensorMode():
        ghosts = {id(p): _ghost(p) for group in groups for p in group["params"]}
        fake = [{**group, "params": [ghosts[id(p)] for p in group["params"]]} for group in groups]
        trained = [replace(t, parameter=ghosts[id(t.parameter)]) for t in setting.trained]

        def ghost(t: Tensor) -> Tensor:  # the frozen factor of a pair is in no group
            return ghosts[id(t)] if id(t) in ghosts else _ghost(t)

        pairs = [replace(p, down=ghost(p.down), up=ghost(p.up)) for p in setting.pairs]
        optimizer = choice.make(fake, replace(setting, trained=trained, pairs=pairs))
        optimizer.step()
        return held_bytes(optimizer)


def _ghost(p: Tensor) -> nn.Parameter:
    device = "cpu" if p.device.type == "meta" else p.device
    ghost = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device))
    ghost.grad = torch.empty_like(ghost)
    return ghost


def _numbers(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Numbers and tensors of the groups and of the optimiser itself that a step may change."""

    def chosen(held: Mapping[str, Any]) -> dict[str, Any]:
        found = {k: v for k, v in held.items() if isinstance(v, int | float | Tensor) and k[0] != "_"}
        return {k: v for k, v in found.items() if k not in _NOT_STATE and _changed(v, optimizer.defaults.get(k))}

    groups = {f"group {i}": chosen(group) for i, group in enumerate(optimizer.param_groups)}
    return {**groups, "optimizer": chosen(vars(optimizer))}


def _changed(value: Any, default: Any) -> bool:
    return isinstance(value, Tensor) or type(value) is not type(default) or value != default


def _write(key: str, value: Any, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put a value into flat tables; what contains others leaves a note of its shape under its own key."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        tensors[key] = value
        return
    parts: Sequence[tuple[Any, Any]]
    if kind in _CONTAINERS:
        parts = list(enumerate(value))
        plain[key] = {"kind": kind, "parts": len(parts)}
    elif isinstance(value, dict):
        parts = list(value.items())
        plain[key] = {"kind": "dict", "parts": [name for name, _ in parts]}
    elif kind in _OBJECTS:
        parts = list(vars(value).items())
        plain[key] = {"kind": kind, "parts": [name for name, _ in parts]}
    else:
        assert value is None or isinstance(value, int | float | str), f"{key}: a {kind} has no place in a checkpoint"
        plain[key] = value
        return
    for name, part in parts:
        _write(f"{key}/{name}", part, tensors, plain)


def _read(
    key: str,
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Any],
    device: torch.device | None,
    made: dict[str, Tensor],
) -> Any:
    """The inverse of `_write`. device: where tensors go; None: they stay. made: tensors by key; some stand twice."""
    if key in tensors:
        if key not in made:
            made[key] = tensors[key].clone() if device is None else tensors[key].to(device, copy=True)
        return made[key]
    note = plain[key]
    if not isinstance(note, Mapping):
        return note
    kind, names = note["kind"], note["parts"]
    if kind == "same":
        return _read(names, tensors, plain, device, made)
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](_read(f"{key}/{i}", tensors, plain, device, made) for i in range(names))
    parts = {name: _read(f"{key}/{name}", tensors, plain, device, made) for name in names}
    if kind == "dict":
        return parts
    from importlib import import_module

    whole = object.__new__(getattr(import_module(_OBJECTS[kind]), kind))
    vars(whole).update(parts)
    return whole
