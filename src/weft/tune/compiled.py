"""What torch.compile made of a model during a run: how many graphs, and how often it had to begin again."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Compilations"]


class Compilations:
    """Counts compilations from its making until `close`.

    A recompilation is one more of a piece of code that was compiled before, for inputs that the first does not fit.
    """

    def __init__(self) -> None:
        from torch._dynamo import callback

        self._handler, self._seen = callback.callback_handler, list[str]()
        self._before = self._counted()
        self._handler.register_start_callback(self._started)

    def _started(self, compilation: Any) -> None:
        if compilation.callback_trigger.name == "DYNAMO":
            self._seen.append(str(compilation.compile_id))

    @staticmethod
    def _counted() -> tuple[int, int]:
        counters = torch._dynamo.utils.counters
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    def as_dict(self) -> dict[str, int]:
        """graphs, graph_breaks, and recompilations so far."""
        now = self._counted()
        # an id is <code>/<how often it was compiled before>
        again = sum(not each.strip("[]!").endswith("/0") for each in self._seen)
        breaks = now[1] - self._before[1]
        return {"graphs": now[0] - self._before[0], "graph_breaks": breaks, "recompilations": again}

    def close(self) -> None:
        """Count no more."""
        self._handler.remove_start_callback(self._started)

    def __str__(self) -> str:
        found = self.as_dict()
        return (
            f"compiled: graphs {found['graphs']}, recompilations {found['recompilations']}, "
            f"graph breaks {found['graph_breaks']}"
        )
