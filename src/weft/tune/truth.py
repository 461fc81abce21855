"""The forecast beside the truth: said before a run, measured while it trains, and kept for the next forecast."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from weft.errors import WeftError
from weft.plan.cache import append_record
from weft.plan.forecast import Forecast
from weft.plan.load import LoadMeter
from weft.plan.truth import Peak, resident_bytes
from weft.tune.ahead import foresee
from weft.tune.session import Session
from weft.units import readable_bytes

__all__ = ["Watched", "bytes_at_rest", "foretell"]

_FEW_STEPS = 5  # a shorter run is mostly its first step, which is slow
_DISTURBED = 0.15  # share of the time that others took: more, and a run says nothing about the machine's own speed
# a forecast is a service: what a model does that cannot be run without numbers must not stop its training
_FAILURES = (
    WeftError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, NotImplementedError,
    OSError,
)  # fmt: skip


@dataclass
class Watched:
    """A run that is being watched: its memory, and what other processes take meanwhile."""

    forecast: Forecast | None
    peak: Peak
    meter: LoadMeter = field(default_factory=lambda: LoadMeter(torch.get_num_threads()))

    def remember(self, *, num_steps: int, num_tokens: int, seconds: float) -> str | None:
        """Keep what training took beside what was forecast; the line that says both."""
        if self.forecast is None or not num_steps:
            return None
        forecast, held, speed = self.forecast, self.peak.bytes(), num_tokens / max(seconds, 1e-9)
        load = self.meter.load()
        disturbed = load.share > _DISTURBED
        record: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "facts": forecast.facts,
            "forecast": {"memory_bytes": forecast.memory_bytes, "tokens_per_second": forecast.tokens_per_second},
            "measured": {
                "memory_bytes": held, "tokens_per_second": speed, "num_steps": num_steps, "seconds": seconds,
                "busy": load.share,
            },
            "memory": held / max(forecast.memory.total, 1),
        }  # fmt: skip
        if num_steps >= _FEW_STEPS and not disturbed:
            record["time"] = forecast.tokens_per_second * forecast.correction.time / max(speed, 1e-9)
        try:
            append_record(record)
        except OSError as error:
            kept = f"which could not be kept ({error.strerror or error})"
        else:
            kept = "kept for the next forecast"
            if disturbed:
                kept += f", but for the speed: {load}"
        return (
            f"forecast and truth: peak memory {readable_bytes(forecast.memory_bytes)} and {readable_bytes(held)}, "
            f"tokens/s {forecast.tokens_per_second:,.0f} and {speed:,.0f}; {kept}"
        )


def bytes_at_rest() -> int:
    """Memory of this process before a run, with the code of transformers, which a run would load: 150 MB by itself."""
    from transformers import PreTrainedModel  # noqa: F401

    return resident_bytes()


def foretell(session: Session) -> tuple[Forecast | None, str]:
    """The forecast for a session's run, and what to say: the forecast, or why there is none."""
    devices = [session.device] if session.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            found = foresee(session.recipe, session.tokenizer, session.splits)
    except _FAILURES as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        why = said if isinstance(error, WeftError) else f"this model cannot be run without its numbers ({said})"
        return None, f"no forecast: {why}"
    return found, str(found)
