"""A forecast: what a run will take, as figures and in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from weft.plan.history import Correction
from weft.plan.memory import Memory
from weft.units import readable_bytes, readable_seconds

__all__ = ["NAMES", "Forecast"]

NAMES = {
    "weights": "base weights", "adapters": "adapter", "gradients": "gradients", "optimizer": "optimiser",
    "activations": "activations", "loss": "loss", "workspace": "workspace", "process": "libraries",
    "allocator": "allocator",
}  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """What a run will take, on the machine that made the forecast.

    memory: bytes at the peak of a training step. seconds: of training, without what is measured before and after it.
    num_trained: trained numbers. disk_bytes: checkpoints and adapter. tokens: of the largest batch, padding included.
    correction: what past runs on this machine changed; `memory` and `seconds` are after it. facts: what runs are
    alike by. notes: what was chosen, and what the published laws say.
    """

    memory: Memory
    seconds: float
    num_steps: int
    tokens_per_second: float
    num_trained: int
    num_frozen: int
    disk_bytes: int
    tokens: int
    flops_per_step: int
    correction: Correction
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()
    price: float | None = None

    @property
    def memory_bytes(self) -> int:
        """The peak: all of `memory`, as past runs correct it."""
        return round(self.memory.total * self.correction.memory)

    @property
    def cost(self) -> float | None:
        """Money, where a price per hour was given (Xia et al. 2024, arXiv 2408.04693: time by price)."""
        return None if self.price is None else self.seconds / 3600 * self.price

    def with_notes(self, *notes: str) -> Forecast:
        """The same with more said."""
        return replace(self, notes=(*self.notes, *notes))

    def as_dict(self) -> dict[str, Any]:
        """All figures, as JSON."""
        return {**asdict(self), "memory_bytes": self.memory_bytes, "cost": self.cost}

    def __str__(self) -> str:
        rows = [(NAMES[f.name], readable_bytes(getattr(self.memory, f.name))) for f in fields(self.memory)]
        if self.memory_bytes != self.memory.total:
            rows.append(("from past runs", f"{(self.memory_bytes - self.memory.total) / 2**20:+.1f} MiB"))
        rows.append(("peak memory", readable_bytes(self.memory_bytes)))
        lines = [f"forecast (largest batch: {self.tokens:,} tokens):"]
        lines += [f"  {name:<20}{value:>12}" for name, value in rows]
        share = self.num_trained / max(self.num_trained + self.num_frozen, 1)
        more = [
            ("trained parameters", f"{self.num_trained:,} ({share:.2%} of all)"),
            ("training", f"{readable_seconds(self.seconds)}, {self.num_steps:,} steps"),
            ("tokens/s", f"{self.tokens_per_second:,.0f}"),
            ("disk", readable_bytes(self.disk_bytes)),
        ]
        if self.cost is not None:
            more.append(("cost", f"{self.cost:,.2f}"))
        lines += [f"  {name:<20}{value}" for name, value in more]
        return "\n".join([*lines, f"  {self.correction}", *(f"  {note}" for note in self.notes)])
