"""The tensors of one method at one site, and the map they make of an operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter, getitem, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.core import fused
from weft.core.affine import Affine, WeightOp
from weft.core.method import Frozen, Method
from weft.core.op import DataOp, Op
from weft.core.plain import is_plain
from weft.core.site import Site
from weft.core.view import OpView, Unbiased

if TYPE_CHECKING:
    from weft.core.held import Held


changes = [0]
"""How often an adapter was made, or dropped what it kept: while it stands still, what was looked up stays right."""


class Adapter(nn.Module):
    """The tensors of one method at one site: parameters train, buffers are saved and do not.

    shared: the holder of tensors that all sites of this adapter use; registered once, at the model's root.
    """

    method: Method
    site: Site
    shared: Shared | None
    plain: bool
    age: int
    held: Held | None
    _kept: tuple[Watched, Mapping[str, Tensor]] | None

    def __init__(
        self, method: Method, site: Site, tensors: Mapping[str, Tensor | Frozen], shared: Shared | None = None
    ):
        super().__init__()
        plain = type(method).coefficients is Method.coefficients and site.experts is None
        # Past torch's __setattr__, which looks through parameters and modules: this runs for every site and step.
        # `age` counts how often kept coefficients were dropped.
        self.__dict__.update(method=method, site=site, shared=shared, plain=plain, held=None, _kept=None, age=0)
        hold(self, tensors)
        changes[0] += 1

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor the method sees at this site, by name."""
        own: dict[str, Tensor] = {**self._parameters, **self._buffers}  # type: ignore[dict-item]
        return own if self.shared is None else {**self.shared.tensors(), **own}

    def coefficients(self, op: Op, *, keep: bool = False) -> Mapping[str, Tensor]:
        """What the method's forward uses. keep: reuse the last result while no tensor has been written to."""
        if torch.compiler.is_compiling():
            return self.tensors() if self.plain else self._compute(op)
        if torch.is_grad_enabled():
            self.forget()  # a step may follow that writes behind the version counter (8-bit optimisers, `.data`)
            if self.held is not None:
                return self.held.coefficients(lambda: self._compute(op))
            return self.tensors() if self.plain else self._compute(op)
        if self.plain:
            return self.tensors()
        if not keep or (self.method.random and isinstance(op, DataOp) and op.source.training()):
            return self._compute(op)  # what is drawn is drawn for one call
        kept = self._kept
        return kept[1] if kept is not None and kept[0].unchanged() else self._keep(op)

    def _keep(self, op: Op) -> Mapping[str, Tensor]:
        """Compute the coefficients and remember what they were made of: which tensor, its version, its memory."""
        computed = self._compute(op)
        assert isinstance(op, DataOp), "coefficients are kept for data only"
        watched = Watched([self], op)
        if watched.countable:
            self.__dict__["_kept"] = watched, computed
        return computed

    def holders(self) -> list[Mapping[str, Tensor | None]]:
        """What holds the tensors that the method sees here."""
        own: list[Mapping[str, Tensor | None]] = [self._parameters, self._buffers]
        return own if self.shared is None else [*own, self.shared._parameters, self.shared._buffers]

    def forget(self) -> None:
        """Drop coefficients kept for inference, here and in stacks of several adapters."""
        own = self.__dict__
        own["_kept"] = None
        own["age"] += 1
        changes[0] += 1

    def run(self, x: Any, op: Op, *, keep: bool = False) -> Any:
        """The adapted map on x, in whatever reading `op` is."""
        c, method = self.coefficients(op, keep=keep), self.method
        if isinstance(op, DataOp) and fused.fuses(op):
            again = (lambda: c) if method.random else (lambda: self._compute(op))
            return fused.value(run(method, c, x, fused.TrainOp(op, c, again)))
        return method.forward(c, x, op) if not method.bias_outside else run(method, c, x, op)

    def _compute(self, op: Op) -> Mapping[str, Tensor]:
        if self.site.experts is None:
            return self.method.coefficients(self.tensors(), op)
        own: dict[str, Tensor] = {**self._parameters, **self._buffers}  # type: ignore[dict-item]
        rest = {} if self.shared is None else self.shared.tensors()

        def one(t: dict[str, Tensor], w: Tensor) -> Mapping[str, Tensor]:
            return self.method.coefficients({**rest, **t}, WeightOp(self.site, w))

        return torch.vmap(one)(own, op.weight())

    def penalty(self) -> Tensor | None:
        """What the method minimises of its own tensors here; None where it has no such wish."""
        if type(self.method).penalty is Method.penalty:
            return None
        if self.site.experts is None:
            return self.method.penalty(self.tensors(), self.site)
        own: dict[str, Tensor] = {**self._parameters, **self._buffers}  # type: ignore[dict-item]
        rest = {} if self.shared is None else self.shared.tensors()
        each = [
            self.method.penalty({**rest, **{k: t[e] for k, t in own.items()}}, self.site)
            for e in range(self.site.experts)
        ]
        return sum((p for p in each if p is not None), start=torch.zeros((), device=self.site.device))

    def extra_repr(self) -> str:
        return str(self.method)


class Watched:
    """Tensors that something was made of: which ones, their versions, their memory.

    adapters, op: those whose tensors they are; of the module's own the ordinary ones (DoRA reads the weight).
    countable: False where some are of torch's inference mode, which count no versions.
    """

    def __init__(self, adapters: Sequence[Adapter], op: DataOp):
        base = op.source.held_in()
        held = [(h, name, t) for a in adapters for h in a.holders() for name, t in h.items() if t is not None]
        held += [(base, name, t) for name, t in base.items() if t is not None and is_plain(t.data)]
        self.countable = not any(t.is_inference() for _, _, t in held)
        self._places = [h for h, _, _ in held], [name for _, name, _ in held]
        self._tensors = [t for _, _, t in held] if self.countable else []
        self._versions, self._pointers = [*map(_version, self._tensors)], [*map(Tensor.data_ptr, self._tensors)]

    def unchanged(self) -> bool:
        """Whether all of them are what they were. Loops of Python's own code: this runs for every site and call."""
        tensors = self._tensors
        return (
            all(map(is_, map(getitem, *self._places), tensors))
            and [*map(_version, tensors)] == self._versions
            and [*map(Tensor.data_ptr, tensors)] == self._pointers
        )


_version = attrgetter("_version")


def run(method: Method, c: Mapping[str, Tensor], x: Any, op: Op) -> Any:
    """A method's body on x, with the bias kept outside where the method asks for that."""
    if not method.bias_outside:
        return method.forward(c, x, op)
    bias = op.bias()
    y = method.forward(c, x, op if bias is None else Unbiased(op))
    return y if bias is None else op.shift(y, bias)


class Shared(nn.Module):
    """Tensors that all sites of one adapter use."""

    def __init__(self, tensors: Mapping[str, Tensor | Frozen]):
        super().__init__()
        hold(self, tensors)

    def tensors(self) -> dict[str, Tensor]:
        return {**self._parameters, **self._buffers}  # type: ignore[dict-item]


def hold(module: nn.Module, tensors: Mapping[str, Tensor | Frozen]) -> None:
    """Register tensors on a module: `Frozen` and integer ones as buffers, the others as parameters."""
    for name, value in tensors.items():
        tensor = value.tensor if isinstance(value, Frozen) else value
        if not isinstance(tensor, nn.Parameter):  # in the order that a file holds, so that a loaded one rounds alike
            tensor = tensor.contiguous()
        if isinstance(value, Frozen) or not tensor.is_floating_point():
            module._buffers[name] = tensor
        else:
            module._parameters[name] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


class Adapted(OpView):
    """An adapter applied to an operator is an operator: this is how adapters nest."""

    def __init__(self, adapter: Adapter, inner: Op):
        super().__init__(inner)
        self.adapter = adapter

    def __call__(self, x: Any) -> Any:
        return self.adapter.run(x, self.inner)

    def weight(self) -> Tensor:
        weight = self._merged().weight
        assert weight is not None, "an adapted map holds the one it adapts"
        return weight

    def bias(self) -> Tensor | None:
        return None if self.inner.bias() is None and not isinstance(self.inner, Adapted) else self._merged().bias

    def _merged(self) -> Affine:
        inner = WeightOp(self.site, self.inner.weight(), self.inner.bias())
        return self.adapter.run(inner.input(), inner)
