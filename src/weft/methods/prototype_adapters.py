"""Prototype-based hyper-adapters: a network makes adapters of prototypes, which the rows of each task gather around."""

from dataclasses import dataclass

import torch

from weft.core import Frozen, Method, option
from weft.core import generated as net


@dataclass(frozen=True)
class PrototypeAdapters(Method):
    """h = y + U relu(D x + d) + u, all of it linear in i = LN(W relu(V [p; e] + v) + w), p the prototype of x's task.

    Zhao et al. 2023, arXiv 2310.11670: a retriever (M relu(N m)) of the mean m of a row's prompt at the last place is
    drawn to other rows of its task, and to p, by two contrastive losses. U starts at 0, so that h = y.
    """

    name = "prototype_adapters"
    paper = "2310.11670"
    kinds = frozenset({"block"})
    default_targets = "mlp-blocks"
    conditions = ("task",)
    aside = ("N", "N_bias", "M", "M_bias")
    num_tasks: int = option(2, help="tasks that share the network", minimum=2)
    task: int | None = option(None, help="this task for all rows, instead of what is given", minimum=0)
    width: int = option(64, help="size of the bottleneck", minimum=1)
    embedding_size: int = option(64, help="numbers of a prototype, and of what the heads read", minimum=1)
    hidden_size: int = option(128, help="inner size of the network, and of the retriever", minimum=1)
    temperature: float = option(0.1, help="of the contrastive losses", above=0)
    weight: float = option(0.1, help="of the contrastive losses beside that of the data", minimum=0)

    def check(self, site):
        net.check_task(self)

    def shared(self, sites):
        site, size, inner, width = sites[0], self.embedding_size, self.hidden_size, net.width_of(sites)
        t = {"prototypes": site.normal(self.num_tasks, size), "norm": site.ones(size), "norm_bias": site.zeros(size)}
        for name, read in {"V": 2 * size, "W": inner, "N": width, "M": inner}.items():
            t |= net.linear_start(site, name, read, inner if name in "VN" else size)
        bound, zero = 1e-3 * (3 / size / width) ** 0.5, ("up", "up_bias")
        return t | net.heads(site, size, self.width, norm=False, zero=zero, bound=bound)

    def init(self, site, op):
        last = site.ones(1) if site.index == site.count - 1 else site.zeros(1)  # where the contrastive losses count
        return {"place": site.normal(self.embedding_size), "last": Frozen(last)}

    def coefficients(self, t, op):
        p = t["prototypes"] if self.task is None else t["prototypes"][self.task : self.task + 1]
        return net.make(t, net.encode(t, p), self.width) | {k: t[k] for k in ("prototypes", "last", *self.aside)}

    def forward(self, c, x, op):
        which = net.picked(self, op, x, "task", self.num_tasks)
        y = op(x) + net.bottleneck(op, x, c, which, torch.relu)
        if not (self.weight and torch.is_grad_enabled()):
            return y
        means, tasks = net.instances(x, op.positions(x), which if self.task is None else which + self.task)
        z = net.linear(c, "M", torch.relu(net.linear(c, "N", means.to(c["N"].dtype))))
        loss = net.contrast(z, tasks, c["prototypes"], self.temperature)
        return op.penalise(y, self.weight * c["last"].sum() * loss)
