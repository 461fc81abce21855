"""Bits and groups per matrix: the program is solved exactly, and the budget is kept."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

from weft.errors import QuantiseError
from weft.kinds.packed import GPTQLinear
from weft.quantise import choose_grids, quantise_model
from weft.quantise.budget import GRIDS, Grid, assign


@pytest.mark.parametrize("seed", range(25))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    losses = [[draw.random() for _ in range(4)] for _ in range(5)]
    sizes = [[draw.randint(1, 9) for _ in range(4)] for _ in range(5)]
    budget = draw.randint(5, 30)
    best = min(
        (sum(losses[i][c] for i, c in enumerate(choice)) for choice in itertools.product(range(4), repeat=5)
         if sum(sizes[i][c] for i, c in enumerate(choice)) <= budget),
        default=None,
    )  # fmt: skip
    found = assign(losses, sizes, budget)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert sum(sizes[i][c] for i, c in enumerate(found)) <= budget
        assert sum(losses[i][c] for i, c in enumerate(found)) == pytest.approx(best)


def matrices() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"easy": 0.01 * torch.randn(64, 64), "hard": torch.randn(64, 128), "usual": 0.3 * torch.randn(32, 64)}


@pytest.mark.parametrize("bits", [2.5, 3.25, 4.1, 6.0])
def test_the_budget_is_kept_and_spent_where_it_helps(bits: float) -> None:
    chosen = choose_grids(matrices(), bits)
    total = sum(w.numel() for w in matrices().values())
    assert sum(w.numel() * chosen[path].cost for path, w in matrices().items()) <= bits * total * 1.0001
    assert chosen["hard"].bits >= chosen["easy"].bits
    errors = [
        sum((w - grid.rounded(w)).square().sum() for w in matrices().values()) for grid in GRIDS if grid.cost <= bits
    ]
    mine = sum((w - chosen[path].rounded(w)).square().sum() for path, w in matrices().items())
    assert mine <= min(errors) * 1.0001, "at least as good as the best single grid that fits"


def test_a_budget_below_every_grid_is_refused() -> None:
    with pytest.raises(QuantiseError, match=r"bits=2.0 cannot be met: the smallest grid takes 2.14"):
        choose_grids(matrices(), 2.0)


def test_what_is_chosen_is_what_the_layers_hold() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128))
    with torch.no_grad():
        model[0].weight.mul_(20)
    weights = {path: layer.weight.detach().clone() for path, layer in model.named_children()}
    chosen = choose_grids(weights, 3.3)
    quantise_model(model, "packed-mixed", bits=3.3)
    for path, layer in model.named_children():
        assert isinstance(layer, GPTQLinear)
        assert (layer.bits, layer.group_size) == (chosen[path].bits, chosen[path].group_size)
        torch.testing.assert_close(layer.dequantize(), chosen[path].rounded(weights[path]))
    stored = sum(
        p.numel() * p.element_size() * 8
        for n, p in model.named_parameters()
        if n.split(".")[-1] in ("qweight", "qzeros", "scales")
    )
    assert stored == pytest.approx(sum(w.numel() * chosen[p].cost for p, w in weights.items()), rel=0.02)


@pytest.mark.parametrize(
    ("scheme", "options", "said"),
    [
        ("packed-mixed", {}, "needs a budget: bits"),
        ("nf4", {"bits": 3.0}, "nf4 has a fixed number of bits"),
        ("nf4", {"group_size": 64}, "nf4 has groups of its own"),
        ("packed-int4", {"group_size": 48}, "one of 32, 64, 128"),
        ("torchao-int4", {"group_size": 128}, "needs inputs in multiples of its group_size=128, and a layer has 64"),
    ],
)
def test_options_that_do_not_fit(scheme: str, options: dict, said: str) -> None:
    pytest.importorskip("torchao")
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(QuantiseError, match=said):
        quantise_model(model, scheme, **options)
    assert type(model[0]) is nn.Linear


def test_a_grid_rounds_to_the_nearest_of_its_steps() -> None:
    w = torch.linspace(-1, 2, 64).repeat(2, 1)
    rounded = Grid(2, 64).rounded(w)
    assert len(rounded[0].unique()) == 4
    assert (rounded - w).abs().max() <= 0.5 * (3 / 3) + 1e-3
