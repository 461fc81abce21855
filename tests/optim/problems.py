"""Small problems for optimisers: tensors in layers with one low-rank pair each, gradients, and a regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from weft.optim import Choice, Groups, Pair, Setting, Trained, choices, resolve

OPTIONS: dict[str, dict[str, Any]] = {
    "apollo": {"rank": 3, "update_proj_gap": 2},
    "badam": {"period": 2},
    "fira": {"rank": 3, "update_proj_gap": 2},
    "frugal": {"update_gap": 2},
    "galore": {"rank": 3, "update_proj_gap": 2},
    "lisa": {"layers": 1, "period": 2},
    "natural-galore": {"rank": 3, "update_gap": 4, "history": 2},
}
"""Options that make something happen within a few steps."""
MATRICES_ONLY = frozenset({"muon"})


def choice(name: str, **options: Any) -> Choice:
    return resolve({"name": name, **OPTIONS.get(name, {}), **options})


def make_tensors(
    layers: int = 2, dtype: torch.dtype = torch.float32, vector: bool = True, size: int = 12
) -> list[Trained]:
    """A [4, I], B [8, 4] and a vector in every layer, and one matrix in none."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"A": (4, size), "B": (8, 4), **({"v": (8,)} if vector else {})}
    found = [
        Trained(f"l.{i}.{key}", _drawn(shape, draw, dtype), i, key)
        for i in range(layers)
        for key, shape in shapes.items()
    ]
    return [*found, Trained("head.W", _drawn((6, 8), draw, dtype), None, "W")]


def _drawn(shape: tuple[int, ...], draw: torch.Generator, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=draw, dtype=dtype))


def setting_of(trained: list[Trained], **values: Any) -> Setting:
    named = {t.name: t.parameter for t in trained}
    pairs = [Pair(p, named[name[:-1] + "B"]) for name, p in named.items() if name.endswith("A")]
    return Setting(trained, 0.01, pairs=pairs, **values)


def groups_of(trained: list[Trained], weight_decay: float = 0.0) -> Groups:
    """Matrices, and the rest without weight decay, as training makes them."""
    matrices = [t.parameter for t in trained if t.parameter.ndim > 1]
    rest = [t.parameter for t in trained if t.parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make(chosen: Choice, trained: list[Trained], weight_decay: float = 0.0, **values: Any) -> torch.optim.Optimizer:
    return chosen.make(groups_of(trained, weight_decay), setting_of(trained, **values))


def give_gradients(trained: list[Trained], step: int) -> list[Tensor]:
    """A gradient for every tensor that asks for one; the same for the same step."""
    draw, given = torch.Generator().manual_seed(100 + step), []
    for t in trained:
        g = torch.randn(t.parameter.shape, generator=draw, dtype=t.parameter.dtype)
        t.parameter.grad = g.clone() if t.parameter.requires_grad else None
        given.append(g)
    return given


def walk(optimizer: torch.optim.Optimizer, trained: list[Trained], steps: range, rate: float = 0.01) -> None:
    """Steps with given gradients, under a rate that changes as schedules change it."""
    for step in steps:
        give_gradients(trained, step)
        if hasattr(optimizer, "seeds"):
            for seed in optimizer.seeds():
                optimizer.tell(seed, 0.5 + step)
        for group in optimizer.param_groups:
            group["lr"] = rate / (1 + step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def regression(dtype: torch.dtype = torch.float32) -> tuple[list[Trained], Callable[[], Tensor]]:
    """Two low-rank layers and a bias that should fit a third; the loss of the whole data."""
    draw = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=dtype)

    x = drawn(48, 12)
    y = x @ (drawn(12, 3) @ drawn(3, 8)) * 0.3
    tensors = {
        "l.0.A": drawn(4, 12) * 0.3,
        "l.0.B": torch.zeros(8, 4, dtype=dtype),
        "l.0.v": torch.zeros(8, dtype=dtype),
    }
    tensors |= {"l.1.A": drawn(4, 12) * 0.3, "l.1.B": torch.zeros(8, 4, dtype=dtype)}
    p = {name: nn.Parameter(t) for name, t in tensors.items()}
    trained = [Trained(name, t, int(name[2]), name[4:]) for name, t in p.items()]

    def loss() -> Tensor:
        hidden = [x @ p[f"l.{i}.A"].mT @ p[f"l.{i}.B"].mT for i in (0, 1)]
        return (hidden[0] + hidden[1] + p["l.0.v"] - y).square().mean()

    return trained, loss


def names(source: str | None = None) -> list[str]:
    return [name for name, load in choices().items() if source in (None, load().source)]
