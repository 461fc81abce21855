"""The layers of a model as they were before it was quantised, for starts that make up for what that loses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

__all__ = ["Originals"]


@dataclass
class Originals:
    """Linear layers by path. They take the memory of the whole model until they are dropped, one by one or all."""

    layers: dict[str, nn.Linear] = field(default_factory=dict)
    replaced: dict[str, nn.Module] = field(default_factory=dict)

    def add(self, path: str, old: nn.Linear, new: nn.Module) -> None:
        """Keep a layer, and remember what stands in its place."""
        self.layers[path], self.replaced[path] = old, new

    def follow(self, model: nn.Module) -> None:
        """Find the layers again in a model that now holds the quantised one (a classifier's head on top of it)."""
        paths = {id(module): path for path, module in model.named_modules()}
        here = {old: paths[id(new)] for old, new in self.replaced.items() if id(new) in paths}
        self.layers = {new: self.layers[old] for old, new in here.items()}
        self.replaced = {new: self.replaced[old] for old, new in here.items()}

    def __bool__(self) -> bool:
        return bool(self.layers)

    def weight(self, path: str) -> Tensor | None:
        """[O, I] in the dtype in which the base was loaded; None for a layer that was not quantised."""
        return self.layers[path].weight.detach() if path in self.layers else None

    def drop(self) -> None:
        """Free them."""
        self.layers.clear()
        self.replaced.clear()

    @contextmanager
    def restored(self, model: nn.Module) -> Iterator[None]:
        """The full-precision base inside the `with`: a teacher without a second model. Adapters of these layers, which
        hang at the quantised ones, are out of the way."""
        quantised = {path: model.get_submodule(path) for path in self.layers}
        try:
            for path, layer in self.layers.items():
                _put(model, path, layer)
            yield
        finally:
            for path, module in quantised.items():
                _put(model, path, module)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    model.get_submodule(parent)._modules[child] = module
