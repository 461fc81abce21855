"""Ctrl-C and SIGTERM as a wish: training finishes its step, writes a checkpoint and ends; a second one ends at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from weft.errors import WeftError

__all__ = ["Interrupted", "Stop"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(WeftError, RuntimeError):
    """The run was asked to stop; the message says what was kept and how to go on."""


class Stop:
    """Inside the `with`, a signal sets `requested` to its name. Only the main thread can install handlers."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def is_requested(self) -> bool:
        """Whether a signal has come."""
        return self.requested is not None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
