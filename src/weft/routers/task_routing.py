"""Task-level routing: the task of a row says how its experts are weighed, by a table that is learnt."""

from dataclasses import dataclass
from typing import Literal

from weft.core import option
from weft.core.router import Router
from weft.core.skills import gates


@dataclass(frozen=True)
class TaskRouting(Router):
    """y = W x + sum_k g_k (f_k(x) - W x),  g = softmax(Z_t), or sigmoid(Z_t) / sum, t the task that is given for a row.

    Of sigmoids every task has a set of skills: while they train these are draws of a relaxed Bernoulli distribution,
    sigmoid((Z + log u - log(1 - u)) / temperature) with u uniform, one for every task at a site in every step.

    Ponti et al. 2022 (Polytropon), arXiv 2202.13914. There it is the parameters of LoRAs that are weighed, which is the
    method poly; here it is what experts of any methods add to the map.
    """

    name = "task_routing"
    paper = "2202.13914"
    num_tasks: int = option(2, help="rows of the table", minimum=1)
    task: int | None = option(None, help="use this task for all rows, instead of the one given for each", minimum=0)
    gate: Literal["sigmoid", "softmax"] = option("sigmoid", help="how a task's weights are made of its row")
    temperature: float = option(1.0, help="of the draws: the lower, the nearer to 0 and 1 they are", above=0)

    @property
    def conditions(self):  # type: ignore[override]
        return tuple(dict.fromkeys(("task", *super().conditions)))

    def check(self, site):
        super().check(site)
        if (self.task or 0) >= self.num_tasks:
            raise ValueError(f"task={self.task}: num_tasks={self.num_tasks} tasks are numbered from 0")

    def own(self, site, op, made):
        return {"Z": site.uniform(self.num_tasks, len(self.experts), bound=1e-3)}

    def route(self, t, x, op):
        g = t["Z"].softmax(-1) if self.gate == "softmax" else gates(op, t["Z"], self.temperature)  # [tasks, K]
        which = op.given(x, "task", self.num_tasks) if self.task is None else self.task
        return op.mix(x, g[which])
