"""Time from operations: work is counted right, and rates between measured points lie between them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from weft.plan import calibration
from weft.plan.calibration import Rates, measure
from weft.plan.speed import multiply_adds, seconds_of
from weft.plan.trace import Call

RATES = Rates(
    matmul={d: [[64, 64, 64, 64**3 * 1e-9], [512, 512, 512, 512**3 * 1e-9]] for d in ("float32", "bfloat16")},
    passes={name: [[1e3, 1e-6], [1e6, 1e-3]] for name in calibration.CLASSES},
    call_seconds=1e-6,
)


def call(name, *inputs, out=(), views=False, new=0) -> Call:
    return Call(f"aten::{name}", tuple((tuple(s), 4) for s in inputs), tuple((tuple(s), 4) for s in out), views, new)


def test_products_are_counted() -> None:
    assert multiply_adds(call("mm.default", (3, 4), (4, 5))) == 60
    assert multiply_adds(call("addmm.default", (5,), (3, 4), (4, 5))) == 60
    assert multiply_adds(call("bmm.default", (2, 3, 4), (2, 4, 5))) == 120
    assert multiply_adds(call("add.Tensor", (3, 4), (3, 4))) == 0
    attention = call("_scaled_dot_product_flash_attention_for_cpu.default", *[(2, 4, 8, 16)] * 3)
    assert multiply_adds(attention) == 2 * (2 * 4 * 8 * 8 * 16)


def test_a_product_takes_its_work_at_the_rate() -> None:
    expected = 128 * 256 * 512 * 1e-9 + 1e-6
    assert seconds_of(call("mm.default", (128, 256), (256, 512)), RATES) == pytest.approx(expected, rel=1e-6)


def test_a_pass_takes_its_bytes_and_a_view_nothing() -> None:
    small = seconds_of(call("add.Tensor", (2**12,), out=[(2**12,)]), RATES)
    large = seconds_of(call("add.Tensor", (2**16,), out=[(2**16,)]), RATES)
    assert large - RATES.call_seconds == pytest.approx(16 * (small - RATES.call_seconds), rel=1e-6)
    assert seconds_of(call("t.default", (2**16,), out=[(2**16,)], views=True), RATES) < small


@pytest.mark.parametrize("name", ["_fft_r2c.default", "_fft_c2r.default", "_fft_c2c.default"])
def test_a_fourier_transform_has_a_rate_of_its_own(name) -> None:
    passes = {**RATES.passes, "fft": [[1e3, 1e-5], [1e6, 1e-2]]}
    took = seconds_of(call(name, (2**12,), out=[(2**12,)]), replace(RATES, passes=passes))
    assert took == pytest.approx(2**15 * 1e-8 + 1e-6, rel=1e-6)


def test_memory_that_is_taken_anew_costs_its_pages() -> None:
    """In place, or into what a call made empty before, the same work takes less."""
    there = call("mul_.Tensor", (2**12,), (2**12,), out=[(2**12,)])
    anew = call("mul.Tensor", (2**12,), (2**12,), out=[(2**12,)], new=2**14)
    pages = 2**14 * 1e-9
    assert seconds_of(anew, RATES) - seconds_of(there, RATES) == pytest.approx(pages, rel=1e-6)
    product = seconds_of(call("mm.default", (64, 64), (64, 64), new=2**14), RATES)
    assert product == pytest.approx(64**3 * 1e-9 + 1e-6 + pages, rel=1e-6)
    empty = call("empty.memory_format", out=[(2**12,)], new=2**14)
    assert seconds_of(empty, RATES) == pytest.approx(0.5e-6 + pages, rel=1e-6)


def test_scale_is_of_the_work_and_not_of_the_overhead() -> None:
    product = call("mm.default", (64, 64), (64, 64))
    assert seconds_of(product, replace(RATES, scale=3.0)) == pytest.approx(3 * 64**3 * 1e-9 + 1e-6, rel=1e-6)


def test_measuring_gives_rates_that_grow_with_the_work(monkeypatch) -> None:
    monkeypatch.setattr(calibration, "_SIZES", (2**12, 2**18))
    monkeypatch.setattr(calibration, "MATMULS", calibration.MATMULS[:3])
    found = measure(torch.device("cpu"), seconds=0.0)
    assert 0 < found.call_seconds < 1e-3
    for points in found.passes.values():
        assert points[-1][1] > points[0][1] > 0
