"""The time of a step from its operations: each by its class and its shapes, at the rates of this machine."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from math import prod

from weft.plan.calibration import Rates, attention_class
from weft.plan.trace import Call, Trace

__all__ = ["flops", "multiply_adds", "seconds_of", "step_seconds"]

_MATMULS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "matmul": 0, "linear": 0}
_ELEMENTWISE = ("exp", "silu", "gelu", "sigmoid", "tanh", "pow", "rsqrt", "sin", "cos", "erf", "dropout", "bernoulli")
_REDUCING = ("sum", "mean", "norm", "amax", "max", "argmax", "var")
_FREE = ("detach", "empty", "lift_fresh", "record_stream", "is_same_size", "_local_scalar_dense", "empty_strided")


def step_seconds(trace: Trace, extra: Mapping[int, int], rates: Rates) -> tuple[float, float]:
    """Seconds of a traced step through all layers, and those of them that the optimiser's update takes.

    extra: how many more layers a traced one stands for.
    """
    totals, known = {False: 0.0, True: 0.0}, {}
    for (call, layer, update), count in trace.calls.items():
        if call not in known:
            known[call] = seconds_of(call, rates)
        totals[update] += known[call] * count * _copies(layer, extra)
    return totals[False] + totals[True], totals[True]


def flops(trace: Trace, extra: Mapping[int, int]) -> int:
    """Floating-point operations of matrix products and attention; a multiply and an add are two."""
    total = 0
    for (call, layer, _), count in trace.calls.items():
        total += 2 * multiply_adds(call) * count * _copies(layer, extra)
    return total


def _copies(layer: int | None, extra: Mapping[int, int]) -> int:
    return 1 if layer is None else 1 + extra.get(layer, 0)


def multiply_adds(call: Call) -> int:
    """Of a matrix product or an attention; 0 of anything else."""
    name = _short(call.name)
    if name in _MATMULS:
        m, k, n, batch = _dims(call, _MATMULS[name])
        return m * k * n * batch
    if "attention" in name:
        return _attention_work(call) * (5 if "backward" in name else 2)
    return 0


def seconds_of(call: Call, rates: Rates) -> float:
    """Seconds of one operation: what any call costs, its work, and the pages of memory that it takes anew."""
    name = _short(call.name)
    if call.views or name in _FREE:  # what is made empty is paid for here, though a later call touches it first
        return 0.5 * rates.call_seconds + rates.scale * _new_seconds(call, rates)
    if "attention" in name:  # measured with its results
        size = next(size for shape, size in call.inputs if len(shape) == 4)
        kind = attention_class(size, backward="backward" in name)
        return rates.call_seconds + rates.scale * _at(rates.passes[kind], _attention_work(call))
    if name in _MATMULS:
        work = _matmul_seconds(call, _MATMULS[name], rates)
    else:
        moved = sum(prod(shape) * size for shape, size in (*call.inputs, *call.outputs))
        work = _at(rates.passes[_kind(name)], moved) if moved else 0.0
    return rates.call_seconds + rates.scale * (work + _new_seconds(call, rates))


def _new_seconds(call: Call, rates: Rates) -> float:
    """A C library hands large pieces back to the system, which clears every page that it gives again."""
    return _at(rates.passes["new"], call.new_bytes) if call.new_bytes else 0.0


def _kind(name: str) -> str:
    for kind in ("softmax", "fft"):
        if kind in name:
            return kind
    if any(name.startswith(word) for word in _ELEMENTWISE):
        return "silu"
    return "sum" if name in _REDUCING else "add"


def _short(name: str) -> str:
    """`mm` of `aten::mm.default`; an operation in place takes what it takes."""
    return name.rpartition("::")[2].partition(".")[0].rstrip("_").removeprefix("_unsafe_")


def _dims(call: Call, first: int) -> tuple[int, int, int, int]:
    a, b = call.inputs[first][0], call.inputs[first + 1][0]
    batch = prod(a[:-2]) if len(a) > 2 else 1
    return a[-2] if len(a) > 1 else 1, a[-1], b[-1], batch


def _matmul_seconds(call: Call, first: int, rates: Rates) -> float:
    m, k, n, batch = _dims(call, first)
    if not m * k * n * batch:
        return 0.0
    kind = "float32" if call.inputs[first][1] >= 4 else "bfloat16"
    near: dict[str, float] = defaultdict(float)
    here = tuple(map(math.log2, (m, k, n)))
    for pm, pk, pn, seconds in rates.matmul[kind]:
        apart = sum((x - math.log2(y)) ** 2 for x, y in zip(here, (pm, pk, pn), strict=True))
        weight = 1 / (apart + 0.1) ** 2
        near["weight"] += weight
        near["cost"] += weight * math.log(seconds / (pm * pk * pn))
    return math.exp(near["cost"] / near["weight"]) * m * k * n * batch


def _attention_work(call: Call) -> int:
    shapes = [shape for shape, _ in call.inputs if len(shape) == 4]
    backward = "backward" in call.name
    query, key = shapes[1 if backward else 0], shapes[2 if backward else 1]
    return prod(query[:2]) * query[-2] * key[-2] * query[-1]


def _at(points: list[list[float]], size: float) -> float:
    """Seconds at a size, on the line between measured points in logarithms; in proportion beyond them."""
    if size <= points[0][0]:
        return points[0][1]
    if size >= points[-1][0]:
        return points[-1][1] * size / points[-1][0]
    for (low, fast), (high, slow) in pairwise(points):
        if size <= high:
            share = (math.log(size) - math.log(low)) / (math.log(high) - math.log(low))
            return math.exp(math.log(fast) + share * (math.log(slow) - math.log(fast)))
    raise AssertionError("a size is below, between or above the points")
