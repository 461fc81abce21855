"""How fast this machine is: a few seconds of measuring, from which the time of any step is put together."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["MATMULS", "Rates", "machine_key", "measure"]

_VERSION = 2  # of what is measured

# (M, K, N): the shapes of layers, of their thin adapters, and of the gradients of both
MATMULS = (
    (64, 512, 512), (512, 256, 256), (512, 512, 512), (512, 512, 1536), (512, 1536, 512), (512, 1024, 1024),
    (2048, 512, 512), (2048, 256, 704), (1024, 256, 4096), (64, 512, 8192), (512, 512, 8), (512, 8, 512), (8, 512, 512),
    (2048, 8, 1024), (2048, 1024, 8), (8, 2048, 1024), (2048, 32, 512), (32, 2048, 512), (256, 2048, 2048),
)  # fmt: skip
_BATCHED = ((64, 4, 64, 64), (8, 256, 64, 256), (8, 256, 256, 64))
_SIZES = (2**12, 2**15, 2**18, 2**20, 2**22, 2**24)  # elements
_CLASSES = ("add", "silu", "sum", "softmax", "attention", "attention_backward")
_ATTENTION = ((1, 4, 256, 64), (4, 4, 256, 64), (1, 8, 768, 64))


@dataclass(frozen=True)
class Rates:
    """Seconds of single operations. matmul: {dtype: [[M, K, N, seconds], ...]}; the rest: {class: [[size, seconds]]}.

    call_seconds: what any operation costs beside its work. scale: what a whole step takes beyond its operations.
    reference_seconds: of a real step, by which the rates of two days can be compared. busy: what other processes did
    meanwhile, where that matters. measured: when. notes: what a user should know of it.
    """

    matmul: Mapping[str, list[list[float]]]
    passes: Mapping[str, list[list[float]]]
    call_seconds: float
    scale: float = 1.0
    reference_seconds: float = 0.0
    busy: str = ""
    measured: str = ""
    notes: tuple[str, ...] = ()

    def fastest(self, other: Rates) -> Rates:
        """Of each operation the faster of two times: others can only slow one down."""
        matmul = {k: [[*a[:3], min(a[3], b[3])] for a, b in _both(v, other.matmul[k])] for k, v in self.matmul.items()}
        passes = {k: [[a[0], min(a[1], b[1])] for a, b in _both(v, other.passes[k])] for k, v in self.passes.items()}
        return replace(self, matmul=matmul, passes=passes, call_seconds=min(self.call_seconds, other.call_seconds))


def _both(a: list[list[float]], b: list[list[float]]) -> Iterator[tuple[list[float], list[float]]]:
    return zip(a, b, strict=True)


def machine_key(device: torch.device) -> str:
    """What rates hold for: the device, the number of threads, and the version of torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {_processor()}"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {_VERSION}"


def measure(device: torch.device, *, seconds: float = 0.02) -> Rates:
    """Measure. seconds: the time for each operation, at least three calls; the fastest of them counts."""

    def clock(run: Callable[[], Any]) -> float:
        return _fastest(run, device, seconds)

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    with torch.random.fork_rng(devices=[]):
        matmul = {name: _matmuls(device, dtype, clock) for name, dtype in dtypes.items()}
        passes = _passes(device, clock)
    small = torch.ones(1, device=device)
    with torch.no_grad():
        call = clock(lambda: [small + small for _ in range(100)]) / 100
    return Rates(matmul, passes, call)


def _matmuls(device: torch.device, dtype: torch.dtype, clock: Callable[..., float]) -> list[list[float]]:
    found = []
    for m, k, n in MATMULS:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
        found.append([m, k, n, clock(lambda a=a, b=b: F.linear(a, b))])
    return found


def _passes(device: torch.device, clock: Callable[..., float]) -> dict[str, list[list[float]]]:
    """By class: [bytes moved (or multiply-adds), seconds]."""
    found: dict[str, list[list[float]]] = {name: [] for name in _CLASSES}
    for size in _SIZES:
        x = torch.randn(size // 64, 64, device=device)
        found["add"].append([12 * size, clock(lambda x=x: x * x)])
        found["silu"].append([8 * size, clock(lambda x=x: F.silu(x))])
        found["sum"].append([4 * size, clock(lambda x=x: x.mean(-1))])
        found["softmax"].append([8 * size, clock(lambda x=x: x.log_softmax(-1))])
    for b, h, t, d in _ATTENTION:
        q, k, v = (torch.randn(b, h, t, d, device=device, requires_grad=True) for _ in range(3))
        work = float(b * h * t * t * d)
        with torch.no_grad():
            forward = clock(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        grad = torch.randn_like(out)
        backward = clock(lambda o=out, q=q, k=k, v=v, g=grad: torch.autograd.grad(o, (q, k, v), g, retain_graph=True))
        found["attention"].append([work, forward])
        found["attention_backward"].append([work, backward])
    return found


def _fastest(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    run()
    best, spent, count = float("inf"), 0.0, 0
    while count < 3 or (spent < seconds and count < 200):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        took = time.perf_counter() - started
        best, spent, count = min(best, took), spent + took, count + 1
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  no file of ours
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")
    except OSError:
        return platform.processor() or "CPU"
