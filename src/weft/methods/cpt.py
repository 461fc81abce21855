"""Context-aware prompt tuning: a prompt of examples whose embeddings may move a little, and never far."""

from dataclasses import dataclass

import torch

from weft.core import Frozen, Method, option
from weft.core.tokens import answer_counts, check_start, start_ids


@dataclass(frozen=True)
class ContextPrompt(Method):
    """y = f([E c + D; E x]) for the tokens c of a context, with trained D [N, C],  |D_n| <= e_n sqrt(C / 2048).

    Training also minimises sum_j decay^j L_j: the mean loss on the tokens of the context's j-th answer from the end.
    After each step D is projected back; tokens that are answers stay as they are. Blau et al. 2024, arXiv 2410.17222.
    """

    name = "cpt"
    paper = "2410.17222"
    kinds = frozenset({"input"})
    default_targets = "input"
    init_ids: tuple[int, ...] | None = option(None, help="the context as token ids: examples as the model sees them")
    init_text: str | None = option(None, help="the context as a text; with neither, random tokens are one")
    num_tokens: int | None = option(None, help="how many tokens init_text has, or are drawn (8)", minimum=1)
    token_types: tuple[int, ...] | None = option(None, help="1 or 3: of a template, 2: input, 4: answer; 5 to 8: next")
    decay: float = option(0.95, help="what an answer's loss counts for each answer from it on", minimum=0, maximum=1)
    epsilon: float = option(0.1, help="how far tokens of the input may move", above=0)
    format_epsilon: float = option(0.1, help="how far tokens of a template may move", above=0)

    def check(self, site):
        check_start(self, site)
        if self.init_text is not None and self.num_tokens is None:
            raise ValueError("init_text: say with num_tokens how many tokens it has, for plans that read no tokenizer")

    def init(self, site, op):
        ids = start_ids(self, site, op, self.num_tokens or 8)
        if {len(self.token_types or ids), self.num_tokens or len(ids)} != {len(ids)}:
            raise ValueError(f"the context has {len(ids)} tokens: num_tokens and token_types must agree")
        tokens = op.weight().mT[torch.tensor(ids, device=site.device)].clone()
        return {k: Frozen(v) for k, v in self.told(tokens, ids).items()} | {"delta": torch.zeros_like(tokens)}

    def told(self, tokens, ids):  # by the context: its tokens, how far each may move, what a loss on each counts
        types, far = self.token_types or (2,) * len(ids), (0.0, *(self.format_epsilon, self.epsilon) * 2)
        bound = tokens.new_tensor([far[k % 4] for k in types]) * (tokens.shape[1] / 2048) ** 0.5
        counts = answer_counts(types, self.decay)
        columns = {"ids": torch.tensor(ids, device=tokens.device), "counts": tokens.new_tensor(counts)}
        return {"tokens": tokens, "bound": bound} | {k: v.unsqueeze(-1) for k, v in columns.items() if any(counts)}

    def coefficients(self, t, op):
        return {**t, "tokens": t["tokens"] + (t["bound"] > 0).unsqueeze(-1) * t["delta"]}

    def forward(self, c, x, op):
        return op.prepend(op(x), c["tokens"], *(c[k] for k in ("ids", "counts") if k in c))

    def evolve(self, parts, progress):
        for part in parts:
            delta = part.tensors["delta"]
            length = delta.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(delta.dtype).tiny)
            delta.mul_((part.tensors["bound"].unsqueeze(-1) / length).clamp(max=1))
