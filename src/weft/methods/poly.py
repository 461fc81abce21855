"""Polytropon and multi-head routing: an inventory of low-rank updates whose factors every task averages its own way."""

from dataclasses import dataclass
from typing import Literal

from weft.core import Frozen, Method, option
from weft.core.generated import check_task
from weft.core.skills import add_update, averaged, gates, inventory, products


@dataclass(frozen=True)
class Poly(Method):
    """y = W x + (alpha / R) B A x,  A = sum_s g_s A_s,  B = sum_s g_s B_s,  g = sigmoid(Z_t) / sum, t the row's task.
    In training the sigmoids are relaxed Bernoulli draws, one for a task in a step. Ponti et al. 2022, arXiv 2202.13914.
    With splits (MHR, Caccia et al. 2022, 2211.03831) every block of A's inputs and of B's outputs has gates of its own;
    with an order (TensorPoly-I, Su et al. 2024, 2405.16671) rows of A_s and B_s are products of vectors.
    """

    name = "poly"
    paper = "2202.13914"
    kinds = frozenset({"linear"})
    random = True
    conditions = ("task",)
    rank: int = option(8, help="inner size of each update", minimum=1)
    alpha: float = option(1.0, help="scale numerator", above=0)
    num_skills: int = option(4, help="updates that tasks share (s)", minimum=1)
    num_splits: int = option(1, help="blocks of the channels that have gates of their own", minimum=1)
    order: int = option(1, help="vectors of whose products A_s and B_s are made; 1: none", minimum=1)
    num_tasks: int = option(2, help="tasks that have gates", minimum=1)
    task: int | None = option(None, help="use this task for all rows, instead of the one given for each", minimum=0)
    routing: Literal["task", "mean"] = option("task", help="gates of the task, or the mean of the skills (MHR-mu)")
    train_skills: bool = option(True, help="train the skills too; otherwise gates alone, of trained ones (MHR-z)")

    def check(self, site):
        check_task(self)
        if site.in_features % self.num_splits or site.out_features % self.num_splits:
            raise ValueError(f"num_splits={self.num_splits} does not divide {site.in_features} and {site.out_features}")

    def init(self, site, op):
        made = inventory(site, self.num_splits, self.num_skills * self.rank, self.order)
        t = {name: tensor if self.train_skills else Frozen(tensor) for name, tensor in made.items()}
        z = {"Z": site.uniform(self.num_tasks, self.num_splits, self.num_skills, bound=1e-3, salt="Z")}
        return t | z if self.routing == "task" else t

    def coefficients(self, t, op):
        c = {k: products(t[k], n // self.num_splits) for k, n in zip("BA", op.site.shape, strict=True)}
        if self.routing == "mean":
            g = c["A"].new_full((1, self.num_splits, self.num_skills), 1 / self.num_skills)
        else:
            g = gates(op, t["Z"])
            if self.task is None:
                return c | {"gates": g}
            g = g[self.task : self.task + 1]
        return {"A": averaged(c["A"], g)[0], "B": self.alpha / self.rank * averaged(c["B"], g)[0].mT}

    def forward(self, c, x, op):
        if "gates" not in c:
            return op.expand(op.project(x, c["A"]), c["B"], onto=op(x))
        which, scale = op.given(x, "task", self.num_tasks), self.alpha / self.rank
        return add_update(op(x), x, c["A"], c["B"], c["gates"], which, scale=scale)
