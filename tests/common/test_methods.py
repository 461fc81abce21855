"""Every registered method, at every kind of site it claims, with every set of small options, keeps every promise."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.common.kinds import CELLS, Cell
from tests.common.references import apply
from weft import checks
from weft.attach import AdapterError, records
from weft.core import Method
from weft.targets import TargetError, resolve

KINDS = {cell.kind for cell in CELLS}
LORA = weft.methods()["lora"](rank=2)


@dataclass(frozen=True)
class Case:
    """One method with one set of options at one tiny model."""

    method: Method
    cell: Cell
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.options)
        return f"{self.method.name}({options})-{self.cell.name.replace(' ', '_')}"


@cache
def built(cell: Cell) -> nn.Module:
    return cell.model()


def fits(method: Method, cell: Cell) -> bool:
    if cell.kind not in method.kinds:
        return False
    try:
        resolve(built(cell), method, cell.targets)
    except TargetError:
        return False
    return True


def reference(name: str) -> Any:
    return import_module(f"tests.common.references.{name}")


COVERED = {
    name: cls
    for name, cls in weft.methods().items()
    if cls.kinds & KINDS and cls.__module__.startswith("weft.") and find_spec(f"tests.common.references.{name}")
}
VARIANTS = {name: [(cls(**o), tuple(o.items())) for o in reference(name).SMALL] for name, cls in COVERED.items()}


def cases(variants: Any) -> Any:
    """The plainest options at every cell; the others at the first cell of each kind: there only the body differs."""
    for number, (method, options) in enumerate(variants):
        seen: set[str] = set()
        for cell in CELLS:
            if (number == 0 or cell.kind not in seen) and fits(method, cell):
                seen.add(cell.kind)
                yield Case(method, cell, options)


CASES = [case for variants in VARIANTS.values() for case in cases(variants)]
first: dict[tuple[str, str], Case] = {}
for _case in CASES:
    first.setdefault((_case.method.name, _case.cell.kind), _case)
PLAINEST = {case.method.name: case for case in reversed(first.values())}
LINEAR = [c for c in CASES if c.cell.kind == "linear"]


def each(cases: Any) -> Any:
    return pytest.mark.parametrize("case", cases, ids=str)


def test_every_method_has_a_reference():
    missing = [
        n
        for n, c in weft.methods().items()
        if c.kinds & KINDS
        and c.__module__.startswith("weft.")
        and n not in COVERED
        and c.surveys is not True  # these need models that tell what they make of a text
    ]
    assert not missing, f"write tests/common/references/<method>.py for {missing}"


@pytest.mark.parametrize("name", COVERED)
def test_every_claimed_kind_is_covered(name):
    cells = {kind for n, kind in first if n == name}
    assert cells == COVERED[name].kinds & KINDS


def close(a: Tensor, b: Tensor, tolerance: float = checks.TOLERANCE) -> None:
    assert a.shape == b.shape
    assert checks.difference(a, b) <= tolerance


@each(CASES)
def test_starts_as_the_base(case):
    checks.check_start(case.method, case.cell)


def dense_map(model: nn.Module, name: str | None) -> Any:
    """The `apply` of a cell's dense equation, with an adapter's tensors written out by its reference."""
    record = records(model)[name] if name is not None else None

    def at(address: str, x: Tensor, expert: int | None = None) -> Tensor:
        seat = model.weave.seats[address]
        if seat.kind == "block":
            W, b = lambda h: plain_block(seat, h), None
        else:
            W, b = seat.weight().detach(), seat.bias()
            W = W if expert is None else W[expert]
        if record is None:
            return apply(W, b, x)
        adapter = record.adapters[address]
        own = {k: v.detach() if expert is None else v[expert].detach() for k, v in own_tensors(adapter).items()}
        return reference(adapter.method.name).dense(adapter.method, {**shared_tensors(adapter), **own}, W, b, x)

    return at


def plain_block(seat: Any, x: Tensor) -> Tensor:
    result = seat.base.forward(seat.module, x)
    return result[0] if isinstance(result, tuple) else result


def own_tensors(adapter: Any) -> Mapping[str, Tensor]:
    return {**adapter._parameters, **adapter._buffers}


def shared_tensors(adapter: Any) -> Mapping[str, Tensor]:
    return {} if adapter.shared is None else {k: v.detach() for k, v in adapter.shared.tensors().items()}


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: c.name)
def test_the_dense_models_equal_the_real_ones(cell):
    kind = next(m for m in (*[v[0][0] for v in VARIANTS.values()],) if fits(m, cell))
    model, batch = checks.woven(kind, cell), cell.batch(3)
    with torch.no_grad(), weft.using(model, None):
        close(cell.dense(model, dense_map(model, None), *batch), model(*batch))


@each(CASES)
def test_forward_equals_the_dense_equation(case):
    model, batch = checks.woven(case.method, case.cell), case.cell.batch(3)
    with torch.no_grad():
        found, base = model(*batch), None
        wanted = case.cell.dense(model, dense_map(model, "a"), *batch)
        close(found, wanted)
        with weft.using(model, None):
            base = model(*batch)
    assert checks.difference(found, base) > 1e-3, "the noise did not change the output: nothing was compared"


@each(CASES)
def test_merged_equals_live_and_unmerges(case):
    checks.check_merge(case.method, case.cell)


@each([c for c in CASES if fits(LORA, c.cell)])
def test_blend_and_stack_merge_with_a_second_lora(case):
    if checks.check_merge(case.method, case.cell) == "merges":
        for route in ({"a": 0.7, "b": 0.4}, weft.Stack("a", "b"), weft.Stack("b", "a")):
            checks.check_merge(case.method, case.cell, route, LORA)


@each(CASES)
def test_a_mixed_batch_equals_one_by_one(case):
    checks.check_rows(case.method, case.cell)


@each(CASES)
def test_gradients_reach_the_adapter_only(case):
    checks.check_gradients(case.method, case.cell)


@each(CASES)
def test_adapters_that_learn_in_one_batch_get_their_own_gradients(case):
    checks.check_many(case.method, case.cell)


@each(CASES)
def test_count_on_meta_equals_the_real_one(case):
    checks.check_count(case.method, case.cell)


@each(CASES)
def test_saved_and_loaded_is_the_same_to_the_bit(case, tmp_path):
    checks.check_saved(case.method, case.cell, tmp_path / "adapter")


@each([c for c in first.values() if not hasattr(reference(c.method.name), "DETACHED")])
def test_gradcheck(case):
    model = checks.woven(case.method, case.cell)
    model.requires_grad_(False)
    names = {id(p): n for n, p in model.named_parameters()}
    own = weft.parameters(model, "a")
    batch = case.cell.batch(2)

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip([names[id(p)] for p in own], values, strict=True)), batch)

    inputs = [p.detach().clone().requires_grad_(True) for p in own]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@each(first.values())
def test_the_base_keeps_its_names_and_class(case):
    model = case.cell.model()
    before, types = model.state_dict(), {n: type(m) for n, m in model.named_modules()}
    checks.attach_to(model, case.method, case.cell)
    after = model.state_dict()
    assert [k for k in after if "adapters." not in k] == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(isinstance(model.get_submodule(n), t) for n, t in types.items())
    weft.detach(model, "a")
    assert {n: type(m) for n, m in model.named_modules()} == types
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@each(first.values())
def test_a_deep_copy_is_independent_and_a_pickle_equal(case):
    model, batch = checks.woven(case.method, case.cell), case.cell.batch(3)
    with torch.no_grad():
        y = model(*batch)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(*batch), y)
        checks.shake(twin, "a", seed=9)
        assert checks.difference(twin(*batch), y) > 1e-3
        assert torch.equal(model(*batch), y)
        assert torch.equal(pickle.loads(pickle.dumps(model))(*batch), y)


@each([c for n, c in PLAINEST.items()])
def test_compiles_in_one_graph(case):
    model, batch = checks.woven(case.method, case.cell), case.cell.batch(3)
    y = model(*batch)
    torch._dynamo.reset()
    close(torch.compile(model, fullgraph=True, backend="eager")(*batch), y)


@each(first.values())
def test_runs_in_bf16_and_under_autocast(case):
    batch = tuple(x.float() if x.is_floating_point() else x for x in case.cell.batch(3))
    with torch.no_grad():
        wanted = checks.woven(case.method, case.cell)(*case.cell.batch(3)).float()
    low = case.cell.model().bfloat16()
    checks.attach_to(low, case.method, case.cell)
    assert all(p.dtype == torch.float32 for p in weft.parameters(low))
    checks.shake(low, "a")
    y = low(*(x.bfloat16() if x.is_floating_point() else x for x in batch))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    moving = checks.moving_parameters(low, case.method, "a")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moving)
    with torch.no_grad(), contextlib.suppress(AdapterError):
        live = low(*(x.bfloat16() if x.is_floating_point() else x for x in batch)).float()
        weft.merge(low, "a")
        assert (
            checks.difference(low(*(x.bfloat16() if x.is_floating_point() else x for x in batch)).float(), live) < 0.1
        )
    single = checks.woven(case.method, case.cell).float()
    with torch.autocast("cpu", torch.bfloat16):
        z = single(*batch)
    for found in (z.float(), single(*batch)):
        assert found.isfinite().all()
        assert checks.difference(found, wanted) < 0.1


@each(PLAINEST.values())
def test_kept_coefficients_notice_an_update(case, monkeypatch):
    model, batch = checks.woven(case.method, case.cell), case.cell.batch(3)
    calls = []
    original = type(case.method).coefficients
    monkeypatch.setattr(type(case.method), "coefficients", lambda *args: calls.append(1) or original(*args))
    with torch.no_grad():
        y = model(*batch)
        once = len(calls)
        assert torch.equal(model(*batch), y)
        if case.cell.kind in ("linear", "conv", "embedding"):
            assert len(calls) == once, "coefficients were computed again though nothing changed"
        checks.shake(model, "a", seed=5)
        changed = model(*batch)
    assert checks.difference(changed, y) > 1e-3
    close(model(*batch), changed)


@pytest.mark.parametrize("name", COVERED)
def test_a_kind_that_is_not_claimed_is_refused(name):
    for cell in CELLS:
        if cell.kind not in COVERED[name].kinds:
            # a block's name does not even match for a method that adapts no blocks: it may mean what is inside
            named = None if cell.kind == "block" else ", ".join(sorted(COVERED[name].kinds))
            with pytest.raises(TargetError, match=named):
                weft.attach(cell.model(), VARIANTS[name][0][0], cell.targets)


@pytest.mark.parametrize("name", [n for n in COVERED if hasattr(reference(n), "FROZEN")])
def test_what_is_saved_and_never_trained(name):
    found = set()
    for case in (c for c in CASES if c.method.name == name):
        model = case.cell.model()
        checks.attach_to(model, case.method, case.cell)
        record = records(model)["a"]
        for holder in (*record.adapters.values(), *record.shared.values()):
            found |= {k for k, v in holder._buffers.items() if v.is_floating_point()}
    assert found == reference(name).FROZEN


@pytest.mark.parametrize("name", COVERED)
def test_documented(name):
    cls = COVERED[name]
    assert len((cls.__doc__ or "").strip().splitlines()) >= 1
    assert "=" in cls.__doc__, "a method's docstring holds its equation"
    assert all(f.metadata.get("help") for f in fields(cls))
