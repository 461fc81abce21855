"""Progress on standard error: a bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from weft.units import readable_bytes, readable_seconds

__all__ = ["Progress", "stderr_console"]


def stderr_console() -> Console:
    """The console that runs talk to: standard error, so that standard output stays data."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


class Progress:
    """Shows how far training is. `update` moves the bar; `note` says a line; `log` is shown when there is no bar.

    name: stands before every line, where several runs speak.
    """

    def __init__(self, console: Console, *, num_steps: int, done: int = 0, name: str = ""):
        self.console, self.num_steps, self.name = console, num_steps, name
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=num_steps, completed=done, figures="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.stop()

    def update(self, step: int, *, loss: float, tokens_per_second: float, memory_bytes: int) -> None:
        """Move the bar to `step`."""
        figures = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {readable_bytes(memory_bytes)}"
        self._bar.update(self._task, completed=step, figures=figures)

    def log(self, step: int, *, loss: float, tokens_per_second: float, memory_bytes: int, seconds_left: float) -> None:
        """One plain line, where a bar would be no use."""
        if not self.console.is_terminal:
            self.note(
                f"step {step}/{self.num_steps}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
                f"{readable_bytes(memory_bytes)}  {readable_seconds(seconds_left)} left"
            )

    def note(self, text: str) -> None:
        """Say one line, above the bar."""
        self.console.print(f"{self.name}: {text}" if self.name else text, markup=False)
