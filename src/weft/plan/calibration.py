"""How fast this machine is: a few seconds of measuring, from which the time of any step is put together."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["CLASSES", "MATMULS", "Rates", "attention_class", "machine_key", "measure"]

_VERSION = 3  # of what is measured

# (M, K, N): the shapes of layers, of their thin adapters, and of the gradients of both
MATMULS = (
    (64, 512, 512), (512, 256, 256), (512, 512, 512), (512, 512, 1536), (512, 1536, 512), (512, 1024, 1024),
    (2048, 512, 512), (2048, 256, 704), (1024, 256, 4096), (64, 512, 8192), (512, 512, 8), (512, 8, 512), (8, 512, 512),
    (2048, 8, 1024), (2048, 1024, 8), (8, 2048, 1024), (2048, 32, 512), (32, 2048, 512), (256, 2048, 2048),
)  # fmt: skip
_BATCHED = ((64, 4, 64, 64), (8, 256, 64, 256), (8, 256, 256, 64))
_SIZES = (2**12, 2**15, 2**18, 2**20, 2**22, 2**24)  # elements
_PASSES = ("add", "silu", "sum", "softmax", "fft")
CLASSES = (
    *_PASSES, "attention", "attention_backward", "attention_bfloat16", "attention_backward_bfloat16", "new",
)  # fmt: skip
"""What `Rates.passes` has a rate for."""
_WAVE, _LARGEST_FFT = 512, 2**20  # elements of one transform, of all: the time is in proportion to these
_ATTENTION = ((1, 4, 32, 64), (1, 4, 128, 64), (1, 4, 256, 64), (4, 4, 256, 64), (1, 8, 768, 64))
_NEW_SIZES = (2**14, 2**17, 2**20, 2**23, 2**26)  # bytes
_HELD_BYTES, _MOST_HELD = 2**24, 16  # of new memory at a time, so that no hole of the heap is used again and again


@dataclass(frozen=True)
class Rates:
    """Seconds of single operations. matmul: {dtype: [[M, K, N, seconds], ...]}; the rest: {class: [[size, seconds]]}.

    All write where something was before; "new" is what memory costs that is taken anew. call_seconds: what any
    operation costs beside its work. scale: by how much its work takes longer within a whole step.
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
        out = torch.empty(m, n, device=device, dtype=dtype)
        found.append([m, k, n, clock(lambda a=a, b=b, o=out: torch.mm(a, b.mT, out=o))])
    return found


def _passes(device: torch.device, clock: Callable[..., float]) -> dict[str, list[list[float]]]:
    """By class: [bytes moved (or multiply-adds), seconds]."""
    found: dict[str, list[list[float]]] = {name: [] for name in _PASSES}
    for size in _SIZES:
        x = torch.randn(size // 64, 64, device=device)
        y, few = torch.empty_like(x), torch.empty(size // 64, device=device)
        found["add"].append([12 * size, clock(lambda x=x, y=y: torch.mul(x, x, out=y))])
        found["silu"].append([8 * size, clock(lambda x=x, y=y: torch.ops.aten.silu.out(x, out=y))])
        found["sum"].append([4 * size, clock(lambda x=x, y=few: torch.mean(x, -1, out=y))])
        found["softmax"].append([8 * size, clock(lambda x=x, y=y: torch.log_softmax(x, -1, out=y))])
        if size <= _LARGEST_FFT:
            waves, y = torch.fft.rfft(x.view(-1, _WAVE)), y.view(-1, _WAVE)
            moved = 8 * waves.numel() + 4 * size
            found["fft"].append([moved, clock(lambda w=waves, y=y: torch.fft.irfft(w, n=_WAVE, out=y))])
    found["new"] = [[size, _new(size, device, clock)] for size in _NEW_SIZES]
    # without instructions for bfloat16 its backward takes ten times as long: sizes that say so in moments
    for dtype, sizes in ((torch.float32, _ATTENTION), (torch.bfloat16, _ATTENTION[:3])):
        found |= _attention(device, dtype, sizes, clock)
    return found


def attention_class(dtype_bytes: int, *, backward: bool) -> str:
    """The class of an attention by the bytes of its numbers."""
    return f"attention{'_backward' if backward else ''}{'' if dtype_bytes >= 4 else '_bfloat16'}"


def _attention(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[tuple[int, int, int, int]], clock: Callable[..., float]
) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {attention_class(dtype.itemsize, backward=back): [] for back in (False, True)}
    forward, backward = found.values()
    for b, h, t, d in sizes:
        q, k, v = (torch.randn(b, h, t, d, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        work = float(b * h * t * t * d)
        with torch.no_grad():
            forward.append([work, clock(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v))])
        out = F.scaled_dot_product_attention(q, k, v)
        grad = torch.randn_like(out)
        took = clock(lambda o=out, q=q, k=k, v=v, g=grad: torch.autograd.grad(o, (q, k, v), g, retain_graph=True))
        backward.append([work, took])
    return found


def _new(size: int, device: torch.device, clock: Callable[..., float]) -> float:
    """Seconds that a piece of memory of so many bytes costs beyond the writing to it."""
    count = max(1, min(_MOST_HELD, _HELD_BYTES // size))
    held = torch.empty(size // 4, device=device)
    both = clock(lambda: [torch.empty(size // 4, device=device).fill_(0.0) for _ in range(count)]) / count
    return max(both - clock(lambda: held.fill_(0.0)), 1e-9)


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
