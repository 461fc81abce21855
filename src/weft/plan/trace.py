"""A training step run on tensors without numbers: every operation with its shapes, and every byte while it lives."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

__all__ = ["Call", "Phase", "Stored", "Trace"]

_ATEN = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_PICKS = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default, _ATEN._index_put_impl_.default}
_SCALAR = _ATEN._local_scalar_dense.default


@dataclass(frozen=True)
class Phase:
    """Where a step is: "start", "forward", "head", "backward" or "update", and in which layer."""

    name: str
    layer: int | None = None


@dataclass(slots=True)
class Stored:
    """One piece of memory: its size, what it is for, when it was made, and in which layer."""

    size: int
    kind: str
    phase: Phase
    layer: int | None


Shape = tuple[tuple[int, ...], int]
"""Sizes, and bytes per element."""


@dataclass(frozen=True)
class Call:
    """One operation by its shapes; alike ones are counted together. new_bytes: of memory that it takes."""

    name: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    views: bool
    new_bytes: int = 0


@dataclass
class Trace:
    """What a step did.

    events: (+1 or -1, index in `stored`, phase). calls: how often each operation ran, by layer, and whether it was
    part of the optimiser's update.
    """

    stored: list[Stored] = field(default_factory=list)
    events: list[tuple[int, int, Phase]] = field(default_factory=list)
    calls: Counter[tuple[Call, int | None, bool]] = field(default_factory=Counter)
    phase: Phase = Phase("start")
    on: bool = False
    _known: dict[int, int] = field(default_factory=dict)
    _held: dict[int, Any] = field(default_factory=dict)
    _roots: dict[int, int | None] = field(default_factory=dict)

    @contextmanager
    def recording(self, fake: FakeTensorMode) -> Iterator[None]:
        """Run what is inside on fake tensors, and record it."""
        with fake, _Recorder(self, fake):
            self.on = True
            try:
                yield
            finally:
                self.on = False

    def give(self, tensor: Tensor, kind: str, layer: int | None = None) -> None:
        """Make known a tensor that is there before the step."""
        for plain in plain_tensors(tensor):
            index = self.keep(plain, kind, layer)
            if index is not None:
                self.stored[index].kind, self.stored[index].layer = kind, layer
                self._roots[index] = layer

    def keep(self, tensor: Tensor, kind: str, layer: int | None) -> int | None:
        """The index of a tensor's memory, which is noted when it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return self._known[key]
        index = len(self.stored)
        self.stored.append(Stored(storage.nbytes(), kind, self.phase, layer))
        self.events.append((1, index, self.phase))
        self._known[key] = index
        self._held[key] = weakref.ref(storage, partial(self._free, key))
        return index

    def layer_of(self, tensor: Tensor) -> int | None:
        """The layer of a tensor that was given."""
        for plain in plain_tensors(tensor):
            index = self._known.get(plain.untyped_storage()._cdata)
            if index is not None and self._roots.get(index) is not None:
                return self._roots[index]
        return None

    def mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Name what tensors turned out to be for."""
        for tensor in tensors:
            for plain in plain_tensors(tensor):
                index = self._known.get(plain.untyped_storage()._cdata)
                if index is not None:
                    self.stored[index].kind = kind

    def gradient(self, parameter: Tensor) -> None:
        """Name a parameter's gradient when it is there."""
        if parameter.grad is not None:
            self.mark([parameter.grad], "gradients")

    def _free(self, key: int, _: Any) -> None:
        self._held.pop(key, None)
        self.events.append((-1, self._known.pop(key), self.phase))

    def watch_layers(self, layers: Mapping[int, nn.Module], optimizer: Any) -> list[Any]:
        """Follow a step through its layers; returns the handles that end it."""
        handles: list[Any] = []
        last = max(layers, default=None)
        for number, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(self._enter(number)))
            handles.append(layer.register_forward_hook(self._leave(number, number == last)))
        if hasattr(optimizer, "register_step_pre_hook"):
            handles.append(optimizer.register_step_pre_hook(self._updating))
        return handles

    def _enter(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:  # noqa: ARG001
            if not _in_backward():
                self.phase = Phase("forward", number)

        return hook

    def _leave(self, number: int, last: bool) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            if _in_backward():
                return
            first = next((t for t in tree_flatten(output)[0] if isinstance(t, Tensor)), None)
            if first is not None and first.requires_grad:
                first.register_hook(lambda gradient: self._back(number))  # noqa: ARG005
            if last:
                self.phase = Phase("head")

        return hook

    def _back(self, number: int) -> None:
        self.phase = Phase("backward", number)

    def _updating(self, *_: Any) -> None:
        if not _in_backward():
            self.phase = Phase("update")


class _Recorder(TorchDispatchMode):
    """Sends operations on to the fake mode; whole numbers and masks stay real, since shapes depend on them."""

    def __init__(self, trace: Trace, fake: FakeTensorMode):
        super().__init__()
        self.trace, self.fake = trace, fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        kwargs = kwargs or {}
        inputs = _inside((args, kwargs.values()))
        if not any(isinstance(a, FakeTensor) for a in inputs) and _whole(func, inputs, args, kwargs):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
            if not any(t.is_floating_point() for t in _tensors(result)):
                return result
            return tree_map_only(Tensor, self.fake.from_tensor, result)
        if func is _SCALAR:
            return _answer(args[0])
        if func in _PICKS:
            args = (args[0], self._numbers(args[1]), *args[2:])
        result = func(*args, **kwargs)
        if self.trace.on:
            self._record(func, inputs, _tensors(result))
        return result

    def _numbers(self, indices: Any) -> list[Any]:
        """Real masks as the row numbers that they pick."""
        found: list[Any] = []
        for index in indices:
            if isinstance(index, Tensor) and not isinstance(index, FakeTensor) and index.dtype in _MASKS:
                with unset_fake_temporarily():
                    found += index.nonzero().unbind(1)
            else:
                found.append(index)
        return [
            self.fake.from_tensor(i) if isinstance(i, Tensor) and not isinstance(i, FakeTensor) else i for i in found
        ]

    def _record(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        trace = self.trace
        layer = trace.phase.layer
        if trace.phase.name in ("update", "start"):
            layer = next((found for t in inputs if (found := trace.layer_of(t)) is not None), None)
        before = len(trace.events)
        for i, tensor in enumerate(outputs):
            if isinstance(tensor, FakeTensor):
                own = layer if len(outputs) == 1 or trace.phase.layer is not None else _at(trace, inputs, i, layer)
                trace.keep(tensor, "", own)
        new = sum(trace.stored[index].size for sign, index, _ in trace.events[before:] if sign > 0)
        views = len(trace.events) == before and not func._schema.is_mutable
        signature = Call(func.name(), tuple(map(_shape, inputs)), tuple(map(_shape, outputs)), views, new)
        trace.calls[signature, layer, trace.phase.name == "update"] += 1


_MASKS = {torch.bool, torch.uint8}


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a tensor's numbers: itself, or the parts of a quantised one."""
    if not isinstance(tensor, FakeTensor) and hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def _answer(number: Tensor) -> float | int | bool:
    """What code that looks at a number is told: a value that can be divided by, also as 1 - value, nothing found, and
    yes."""
    if number.dtype == torch.bool:
        return True
    return 0.5 if number.is_floating_point() else 0


def _at(trace: Trace, inputs: list[Tensor], index: int, default: int | None) -> int | None:
    """The layer of the i-th input: what a call on lists of tensors makes of it belongs there as well."""
    return trace.layer_of(inputs[index]) if index < len(inputs) else default


def _whole(func: Any, inputs: list[Tensor], args: Any, kwargs: Any) -> bool:
    """Whether an operation is one on whole numbers only, which are few and really computed."""
    if inputs:
        return not any(t.is_floating_point() or t.is_complex() for t in inputs)
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not dtype.is_floating_point and not dtype.is_complex
    numbers = [a for a in tree_flatten(args)[0] if isinstance(a, int | float)]
    return func.overloadpacket in (_ATEN.arange, _ATEN.full, _ATEN.scalar_tensor) and not any(
        isinstance(n, float) for n in numbers
    )


def _inside(values: Any) -> list[Tensor]:
    """The tensors among arguments and in lists of them; quicker than a general walk, and run for each operation."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple) or type(value) is _VALUES:
            found += _inside(value)
    return found


_VALUES: type = type({}.values())


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else _inside(result if isinstance(result, list | tuple) else ())


def _shape(tensor: Tensor) -> Shape:
    return tuple(tensor.shape), tensor.element_size()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
