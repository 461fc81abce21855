"""Mixed batches without gradients: coefficients are stacked once, and what adapters have in common is there once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.common.test_methods import CASES
from weft import checks
from weft.attach import records
from weft.core.route import Rows, as_route
from weft.core.stacked import Gained, Stacked

M = weft.methods()
NAMES = ["a0", "a1", "a2"]
X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
LINEAR = [case for case in CASES if case.cell.name == next(c.cell.name for c in CASES if c.cell.kind == "linear")]


def carrying(*methods: weft.Method) -> nn.Module:
    """A map of 16 channels to 24 with one adapter of each method; their tensors are drawn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24))
    for n, method in enumerate(methods):
        weft.attach(model, method, ["0"], name=f"a{n}", seed=n)
    with torch.no_grad():
        for p in weft.parameters(model):
            p.add_(0.2 * torch.randn_like(p))
    return model


@torch.no_grad()
def mixed(model: nn.Module, rows: Rows, x: Tensor = X) -> Tensor:
    with weft.using(model, rows):
        return model(x)


@torch.no_grad()
def apart(model: nn.Module, rows: Rows, x: Tensor = X) -> Tensor:
    """The same rows one by one."""
    found = []
    for i, number in enumerate(rows.ids):
        with weft.using(model, rows.routes[number]):
            found.append(model(x[i : i + 1]))
    return torch.cat(found)


def stacks(rows: Rows) -> list[dict[str, Tensor | Gained]]:
    return [s._kept[2] for s in rows._cache.values() if isinstance(s, Stacked) and s._kept]


@pytest.mark.parametrize("case", LINEAR, ids=str)
@torch.no_grad()
def test_a_mixed_batch_without_gradients_equals_one_by_one(case) -> None:
    checks.check_rows(case.method, case.cell)


@pytest.mark.parametrize("route", [NAMES, ["a2", "a0", "a2"]])
def test_random_matrices_of_one_seed_are_there_once(route: list[str]) -> None:
    model, rows = carrying(*[M["vera"](rank=6)] * 3), as_route(route)
    torch.testing.assert_close(mixed(model, rows), apart(model, rows))
    (found,) = stacks(rows)
    assert found["A"].shape == (1, 6, 16)
    assert isinstance(found["B"], Gained)
    assert found["B"].matrix.shape == (1, 24, 6)
    assert found["B"].left.shape == (len(rows.routes), 24)


def test_random_matrices_that_differ_are_multiplied_out() -> None:
    model, rows = carrying(*[M["vera"](rank=6)] * 3), as_route(NAMES)
    records(model)["a1"].shared["vera"].B.mul_(2)  # as one that was loaded from a folder may be
    torch.testing.assert_close(mixed(model, rows), apart(model, rows))
    (found,) = stacks(rows)
    assert found["B"].shape == (3, 24, 6)
    assert found["A"].shape == (1, 6, 16)


def test_a_basis_that_a_set_shares_is_there_once() -> None:
    model, rows = carrying(*[M["shared_basis"](rank=4)] * 3), as_route(NAMES)
    with torch.no_grad():
        for name in NAMES[1:]:
            for key in ("U", "V"):
                records(model)[name].adapters["0"]._buffers[key] = records(model)["a0"].adapters["0"]._buffers[key]
    torch.testing.assert_close(mixed(model, rows), apart(model, rows))
    (found,) = stacks(rows)
    assert [found[k].shape[0] for k in ("U", "V", "S")] == [1, 1, 3]


def test_what_is_written_into_a_tensor_is_seen() -> None:
    model, rows = carrying(*[M["lora"](rank=2)] * 3), as_route(NAMES)
    mixed(model, rows)
    adapter = records(model)["a1"].adapters["0"]
    for write in (
        lambda: adapter.B.mul_(2),
        lambda: setattr(adapter.B, "data", 3 * adapter.B.data),
        lambda: setattr(adapter, "B", nn.Parameter(3 * adapter.B.data)),
    ):
        with torch.no_grad():
            before = mixed(model, rows)
            write()
            assert not torch.equal(mixed(model, rows)[1], before[1])
            torch.testing.assert_close(mixed(model, rows), apart(model, rows))


def test_a_route_that_was_kept_meets_the_adapters_that_are_there_now() -> None:
    model, rows = carrying(*[M["lora"](rank=2)] * 3), as_route(NAMES)
    mixed(model, rows)
    weft.use(model, None)  # the route is not in use while the adapter is exchanged
    weft.detach(model, "a1")
    weft.attach(model, M["ia3"](), ["0"], name="a1")
    with torch.no_grad():
        records(model)["a1"].adapters["0"].gain.mul_(1.5)
    torch.testing.assert_close(mixed(model, rows), apart(model, rows))


def test_what_training_draws_is_drawn_for_one_call() -> None:
    model, rows = carrying(*[M["diff_pruning"]()] * 2), as_route(NAMES[:2])
    assert torch.equal(mixed(model.eval(), rows, X[:2]), mixed(model, rows, X[:2]))
    assert not torch.equal(mixed(model.train(), rows, X[:2]), mixed(model, rows, X[:2]))
