"""User-conditioned routing: a vector of the row's user says how its experts are weighed."""

from dataclasses import dataclass

import torch.nn.functional as F

from weft.core import Frozen, option
from weft.core.router import Router


@dataclass(frozen=True)
class UserRouting(Router):
    """y = W x + sum_k g_k (f_k(x) - W x),  g = softmax((G z + b) / temperature),  z = relu(H norm(e) + h), e the vector
    of the user that is given for a row.

    The vectors serve all sites, the rest is a site's own. They may come from a recommender: write them into the tensor
    `users`, and train them no further. Zhu et al. 2024 (RecLoRA), arXiv 2408.03533, where the experts are LoRAs; the
    authors' code sums their A and their B apart, and drops a tenth of z in training.
    """

    name = "user_routing"
    paper = "2408.03533"
    num_users: int = option(2, help="users that have a vector", minimum=1)
    user: int | None = option(None, help="use this user for all rows, instead of the one given for each", minimum=0)
    embedding_size: int = option(64, help="numbers of a user's vector", minimum=1)
    train_users: bool = option(True, help="train the vectors too")
    hidden: int | None = option(60, help="channels of z; null: z is the vector itself", minimum=1)
    temperature: float = option(1.0, help="the larger, the more alike the gates", above=0)

    @property
    def conditions(self):  # type: ignore[override]
        return tuple(dict.fromkeys(("user", *super().conditions)))

    def check(self, site):
        super().check(site)
        if (self.user or 0) >= self.num_users:
            raise ValueError(f"user={self.user}: num_users={self.num_users} users are numbered from 0")

    def own_shared(self, sites):
        users = sites[0].normal(self.num_users, self.embedding_size, salt="users")
        return {"users": users if self.train_users else Frozen(users)}

    def own(self, site, op, made):
        count, read = len(self.experts), self.hidden or self.embedding_size
        t = {"G": site.uniform(count, read, bound=read**-0.5, salt="G"), "b": site.zeros(count)}
        if self.hidden is None:
            return t
        bound = self.embedding_size**-0.5
        h = site.uniform(self.hidden, self.embedding_size, bound=bound, salt="H")
        return t | {"H": h, "h": site.zeros(self.hidden)}

    def route(self, t, x, op):
        e = t["users"][op.given(x, "user", self.num_users) if self.user is None else self.user]  # [..., E]
        if self.hidden is not None:
            e = (F.layer_norm(e, e.shape[-1:]) @ t["H"].mT + t["h"]).relu()
        return op.mix(x, ((e @ t["G"].mT + t["b"]) / self.temperature).softmax(-1))
